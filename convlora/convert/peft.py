"""Hugging Face PEFT's LoRA, rsLoRA and DoRA on linear layers and 1-D to 3-D convolutions, both ways.

A folder with `adapter_model.safetensors` (keys `base_model.model.<module>.lora_A.weight` `(r, in, *kernel)` and
`lora_B.weight` `(out, r, 1, …)`) and `adapter_config.json`, the only place of alpha: ΔW = s·B·A on the im2col
matrices, s = alpha/r, or alpha/√r with `use_rslora`. `modules_to_save` and trained biases become `train=` tensors.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convlora import files
from convlora.adapter import Adapter
from convlora.convert.peft_read import unpack
from convlora.convert.peft_write import pack
from convlora.errors import FileError

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


def from_peft(model: nn.Module, folder: str | Path, name: str = "default") -> Adapter:
    """Put an adapter that PEFT saved on the same base model; on any error the model stays as it was.

    LoRA and rsLoRA become method "lora" with the file's own alpha, DoRA becomes "dora", with no loss. Biases that PEFT
    trained (`bias=`, `lora_bias`) and `modules_to_save` become tensors trained in full.

    Args:
        folder: what `PeftModel.save_pretrained` wrote, with `adapter_config.json` and `adapter_model.safetensors`.
        name: the adapter's name on this model.

    Raises:
        FileError: files missing or damaged, a pickle, another method than LoRA, keys that are none of this model's,
            config and tensors that disagree, or a kind of LoRA that is no change of these weights alone.
        ConvloraError: the name is taken, or PEFT computes something else than W₀ + ΔW on a layer of this model.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == WEIGHTS else folder
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise FileError(
                f"{folder / 'adapter_model.bin'} is a pickle, and convlora never unpickles: load it with PEFT and "
                "save it again with save_pretrained, which writes safetensors"
            )
        raise FileError(f"{folder} holds no {WEIGHTS}")
    tensors, _ = files.read(folder / WEIGHTS)
    source = str(folder / WEIGHTS)
    foreign = [key for key in tensors if not key.startswith(PREFIX)]
    if foreign:
        raise FileError(
            f"{source}: key {foreign[0]!r} does not begin with {PREFIX!r}, as PEFT's do; nothing was loaded. A file of "
            "diffusers goes through convlora.convert.from_diffusers"
        )
    return unpack(model, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, config, name, source)


def to_peft(adapter: Adapter, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write an adapter as a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    Method "lora" keeps its factors, "dora" too; any other change that is a product of two factors (Tucker, PaRa,
    LiDB, loralib's layout, …) is written as exactly these factors, as a LoRA. Scale and strength go into alpha.
    `train=` tensors go to `modules_to_save` where they are whole modules, and to `bias="lora_only"` where they are
    biases of adapted layers.

    Args:
        dtype: of the tensors in the file; None keeps theirs.

    Raises:
        ConvloraError: PEFT cannot hold it: the change has no low rank, or the layer is one that PEFT does not adapt
            (transposed, raw or normalised weights) or computes something else on (dilation, padding modes).
    """
    tensors, config = pack(adapter)
    folder = Path(folder)
    weights = {PREFIX + key: files.cast(tensor, dtype) for key, tensor in tensors.items()}
    with contextlib.ExitStack() as both:  # renamed into place only when both are written
        config_file = both.enter_context(files.replacing(folder / CONFIG))
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        files.write(folder / WEIGHTS, weights, {"format": "pt"})
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileError(f"{folder} is no PEFT adapter: it holds no {CONFIG}, without which alpha and rank are unknown")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise FileError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise FileError(f"{path} holds no JSON object")
    return config
