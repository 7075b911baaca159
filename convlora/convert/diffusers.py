"""diffusers' LoRA files, both ways: PEFT's tensors in one file, without PEFT's prefix, its config in the metadata.

`pytorch_lora_weights.safetensors` with keys `[<component>.]<module>.lora_A.weight`, or the older
`<module>.lora.down.weight`; the metadata `lora_adapter_metadata` is the JSON of PEFT's config, its keys under the
component's name as well. Without it, alpha comes from `<module>.alpha` and is the rank where that is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlora import files
from convlora.adapter import Adapter
from convlora.attach import base_modules
from convlora.convert.peft_read import unpack
from convlora.convert.peft_write import pack
from convlora.errors import FileError

METADATA = "lora_adapter_metadata"
_OLD = {".lora.down.weight": ".lora_A.weight", ".lora.up.weight": ".lora_B.weight"}


def from_diffusers(model: nn.Module, file: str | Path, name: str = "default", component: str | None = None) -> Adapter:
    """Put an adapter from a diffusers file on the same base model; on any error the model stays as it was.

    Args:
        file: the safetensors file, or the folder with `pytorch_lora_weights.safetensors`.
        name: the adapter's name on this model.
        component: the part of a pipeline that `model` is, "unet", "transformer", "text_encoder", …: only the keys
            under it are read. None: the file must be of this model alone.

    Raises:
        FileError: the file is missing or damaged, or a key is no layer of this model.
        ConvloraError: the name is taken, or diffusers computes something else than W₀ + ΔW on a layer.
    """
    path = Path(file)
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    tensors, metadata = files.read(path)
    source = str(path)
    if component is None:
        component = _only_component(model, tensors)
    if component:
        tensors = {k.removeprefix(f"{component}."): t for k, t in tensors.items() if k.startswith(f"{component}.")}
        if not tensors:
            raise FileError(f"{source} holds no key that begins with {component + '.'!r}; nothing was loaded")
    tensors = {_peft_key(key): tensor for key, tensor in tensors.items()}
    alphas = {key.removesuffix(".alpha"): float(tensors.pop(key)) for key in list(tensors) if key.endswith(".alpha")}
    config = _config(metadata, component, source) or _config_of(tensors, alphas)
    return unpack(model, tensors, config, name, source)


def to_diffusers(
    adapter: Adapter, file: str | Path, component: str | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write an adapter as the file that diffusers' `load_lora_adapter` and `load_lora_weights` read.

    The metadata has alpha, which diffusers itself loses when it writes kohya's format.

    Args:
        file: a folder of diffusers calls it `pytorch_lora_weights.safetensors`.
        component: the part of a pipeline that the model is, "unet" or "transformer", as `load_lora_weights` wants it;
            None writes bare keys, for `model.load_lora_adapter(…, prefix=None)`.
        dtype: of the tensors in the file; None keeps theirs.

    Raises:
        ConvloraError: as `to_peft`, which has the same limits.
    """
    tensors, config = pack(adapter)
    prefix = f"{component}." if component else ""
    config = {prefix + key: value for key, value in config.items()}
    weights = {prefix + key: files.cast(tensor, dtype) for key, tensor in tensors.items()}
    return files.write(file, weights, {"format": "pt", METADATA: json.dumps(config, indent=2, sort_keys=True)})


def _only_component(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The common first word of all keys, where no module of the model has that name."""
    first = {key.partition(".")[0] for key in tensors}
    names = {name.partition(".")[0] for name, _ in base_modules(model)}
    return first.pop() if len(first) == 1 and not first & names else ""


def _peft_key(key: str) -> str:
    for old, new in _OLD.items():
        key = key.replace(old, new)
    return re.sub(r"\.processor\.(\w+?)_lora\.(down|up)\.weight$", _processor, key)


def _processor(match: re.Match[str]) -> str:
    # The attention processors of 2023 held the LoRA of their layer's projections: to_q_lora, …, to_out_lora.
    layer = "to_out.0" if match[1] == "to_out" else match[1]
    return f".{layer}.lora_{'A' if match[2] == 'down' else 'B'}.weight"


def _config(metadata: Mapping[str, str], component: str, source: str) -> dict[str, Any] | None:
    if METADATA not in metadata:
        return None
    try:
        config = dict(json.loads(metadata[METADATA]))
    except (ValueError, TypeError) as error:
        raise FileError(f"{source}: its metadata {METADATA} is no JSON object ({error}); nothing was loaded") from None
    prefix = f"{component}." if component else ""
    return {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}


def _config_of(tensors: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Any]:
    """What diffusers infers where a file says nothing: ranks of the tensors, alpha = rank unless it is given."""
    ranks = {
        key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in tensors.items() if key.endswith("lora_A.weight")
    }
    return {
        "r": next(iter(ranks.values()), 1),
        "lora_alpha": next(iter(ranks.values()), 1),
        "rank_pattern": {f"^{re.escape(layer)}": rank for layer, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(layer)}": alphas.get(layer, rank) for layer, rank in ranks.items()},
        "use_dora": any(key.endswith("lora_magnitude_vector") for key in tensors),
        "lora_bias": any(key.endswith("lora_B.bias") for key in tensors),
    }
