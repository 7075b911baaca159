"""A convlora adapter as PEFT's LoRA tensors and config: what PEFT's folders and diffusers' files have in common."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from convlora.adapter import Adapter
from convlora.attach import base_modules
from convlora.convert.common import (
    alpha_for,
    full_strength,
    groups_of,
    low_rank,
    refuse_unless_plain,
    trained_values,
)
from convlora.convert.layouts import im2col_to_peft_groups
from convlora.errors import ConvloraError
from convlora.methods.dora import DoRA


def pack(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`({"<module>.<tensor>": tensor}, config)`, as PEFT names them without its prefix."""
    layers = adapter.layers
    if not layers:
        raise ConvloraError("PEFT needs a layer with a LoRA; this adapter only has tensors trained in full")
    refuse_unless_plain(adapter.model, layers, "PEFT", by_weight=False)
    dora = adapter.method == "dora"
    rslora = bool(adapter.options.get("rslora"))
    tensors: dict[str, Tensor] = {}
    ranks, alphas = dict[str, int](), dict[str, float]()
    for layer, change in layers.items():
        module = adapter.model.get_submodule(layer)
        shape, groups = adapter.record.slot(adapter.model, layer).shape, groups_of(module)
        if isinstance(change, DoRA):
            if change.sums != (1, 2):
                raise ConvloraError(f"layer {layer!r}: PEFT's DoRA has one magnitude per output; this one is per input")
            if groups > 1:
                raise ConvloraError(f"layer {layer!r}: PEFT's DoRA is wrong on grouped convolutions")
            full_strength(adapter, change, layer, "PEFT")
            A, B, scale = change.A.detach(), change.B.detach(), float(change.scale)
            ones = [1] * len(shape[2:])
            magnitude = change.magnitude.detach()
            tensors[f"{layer}.lora_magnitude_vector"] = magnitude.view(1, -1, *ones) if ones else magnitude
        else:
            A, B, scale = low_rank(adapter, layer, "PEFT")
        if groups > 1:
            A, B = im2col_to_peft_groups(A, B, groups)
        r = A.shape[0]
        tensors[f"{layer}.lora_A.weight"] = A.reshape(r, -1, *shape[2:])
        tensors[f"{layer}.lora_B.weight"] = B.reshape(*B.shape, *[1] * len(shape[2:]))
        ranks[layer], alphas[layer] = r, alpha_for(scale, r, A, rslora)
    saved, biases = _trained(adapter, layers, tensors)
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "target_modules": _targets(adapter.model, layers),
        # The caret keeps "up.conv" from matching "block.up.conv": PEFT matches the end of a name.
        "rank_pattern": {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(layer)}": _plain(a) for layer, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "lora_only" if biases else "none",
        "modules_to_save": saved or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return tensors, config


def _trained(adapter: Adapter, layers: Iterable[str], tensors: dict[str, Tensor]) -> tuple[list[str], bool]:
    """Add `train=` tensors; returns the modules that PEFT is to save whole, and whether biases of layers are there."""
    values, model = trained_values(adapter), adapter.model
    biases = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in values]
    for key in biases:
        tensors[f"{key[:-5]}.base_layer.bias"] = values.pop(key)
    tensors.update(values)
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in values))
    everything = [name for name, _ in base_modules(model)]
    for owner in owners:
        if left := sorted(set(_own_state(model, owner)) - set(values)):
            raise ConvloraError(
                f"PEFT saves modules whole: {owner!r} was trained in part, without {left[:3]}. Train all of it, or "
                "save with adapter.save()"
            )
        others = [name for name in everything if name.endswith(owner) and name != owner and name not in owners]
        others += [layer for layer in layers if re.match(rf"(^|.*\.){owner}($|\..*)", layer)]
        if not owner or others:
            raise ConvloraError(
                f"PEFT finds modules_to_save by the end of their names: {owner!r} would also take "
                f"{', '.join(map(repr, others[:3])) or 'the whole model'}. Use adapter.save(), or rename it"
            )
    return owners, bool(biases)


def _own_state(model: nn.Module, owner: str) -> Iterable[str]:
    prefix = owner + "." if owner else ""
    for name, module in base_modules(model):
        if name == owner or name.startswith(prefix):
            kept = [b for b in module._buffers if b not in module._non_persistent_buffers_set]
            present = [key for key in (*module._parameters, *kept) if getattr(module, key, None) is not None]
            yield from (f"{name}.{key}" for key in present)


def _targets(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """Layer names, or one regular expression where the end of another layer's name would match as well."""
    layers = list(layers)
    others = [name for name, _ in base_modules(model) if name not in layers]
    if any(other.endswith(f".{layer}") for other in others for layer in layers):
        return "|".join(re.escape(layer) for layer in layers)
    return layers


def _most_common(values: Iterable[Any]) -> Any:
    counted = collections.Counter(values).most_common(1)
    return counted[0][0] if counted else 8


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha
