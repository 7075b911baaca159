"""PEFT's LoRA tensors and config as a convlora adapter: what PEFT's folders and diffusers' files have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from convlora.adapter import Adapter
from convlora.attach import base_modules
from convlora.convert.common import Part, alpha_for, groups_of, known_layers, put, refuse_unless_plain
from convlora.convert.layouts import peft_groups_to_im2col
from convlora.errors import FileError
from convlora.layers import find_slot

_LORA_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_B.bias")
# Fields of a config that say nothing of what the tensors mean, or that are read below. Any other that is set changes
# what PEFT computes.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weight as it was. Others (PiSSA, OLoRA, CorDA, LoftQ) take their start off it.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def unpack(
    model: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str, source: str
) -> Adapter:
    """The adapter of PEFT's tensors, keyed `<module>.<tensor>`, under its config."""
    _check_config(config, source)
    lora: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind in _LORA_TENSORS if key.endswith(f".{kind}") or key == kind), None)
        if kind is not None:
            lora.setdefault(key[: -len(kind) - 1], {})[kind] = tensor
        elif ".lora_" in key or ".original_module." in key or ".modules_to_save." in key:
            # With bias= and modules_to_save together PEFT writes the bias three times, once under its own name.
            if _own_name(key) == key or _own_name(key) not in tensors:
                raise FileError(
                    f"{source}: {key!r} is none of the tensors that PEFT saves for LoRA; nothing was loaded "
                    "(convlora.convert.sniff tells formats apart)"
                )
        else:
            trained[key.replace(".base_layer.", ".")] = tensor
    if not lora and not trained:
        raise FileError(f"{source} holds no tensor of a LoRA; nothing was loaded")
    known_layers(model, lora, source)
    _check_targets(model, lora, config, source)
    refuse_unless_plain(model, [layer for layer in lora if not _raw_matrix(model, layer, config)], "PEFT", False)
    parts = {}
    for layer, own in lora.items():
        parts[layer] = _part(model, layer, own, config, source)
        if (bias := own.get("lora_B.bias")) is not None:
            trained[f"{layer}.bias"] = _bias(model, layer, bias, config, trained)
    options = {"relative": False, "rslora": bool(config.get("use_rslora"))}
    return put(model, name, source, "dora" if config.get("use_dora") else "lora", parts, options, trained)


def _check_config(config: Mapping[str, Any], source: str) -> None:
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise FileError(f"{source} is an adapter of PEFT's {kind}; convlora reads its LORA (with rsLoRA and DoRA)")
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise FileError(
            f"{source}: init_lora_weights={start!r} takes the start off the base weight, so that the file's tensors "
            "are no change of it; save it in PEFT with path_initial_model_for_weight_conversion, which gives a LoRA"
        )
    strange = sorted(key for key, value in config.items() if key not in _HARMLESS and value)
    if strange:
        raise FileError(f"{source}: its config sets {strange}, which changes what PEFT computes; convlora cannot")
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        if isinstance(config.get(key, 8), bool) or not isinstance(config.get(key, 8), kinds):
            raise FileError(f"{source}: its config has {key}={config.get(key)!r}, which is no number")


def _check_targets(model: nn.Module, layers: Iterable[str], config: Mapping[str, Any], source: str) -> None:
    """A layer that the config targets and the file has no tensors for is a damaged file, not a zero change."""
    targets, exclude = config.get("target_modules"), config.get("exclude_modules")
    if not targets or targets == "all-linear" or config.get("layers_to_transform") is not None:
        return
    named = [name for name, module in base_modules(model) if name and find_slot(module) is not None]
    saved = config.get("modules_to_save") or ()
    wanted = {n for n in named if _targeted(targets, n, source) and not _targeted(exclude, n, source)}
    wanted -= {name for name in named if any(_matches(rf"(^|.*\.){m}($|\..*)", name, source) for m in saved)}
    if missing := sorted(wanted - set(layers)):
        raise FileError(
            f"{source} has no tensors for {missing[:5]}, which its config targets in this {type(model).__name__}; "
            "nothing was loaded"
        )


def _targeted(targets: str | list[str] | None, name: str, source: str) -> bool:
    if isinstance(targets, str):
        return _matches(rf"(?:{targets})\Z", name, source)
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _matches(pattern: str, name: str, source: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise FileError(f"{source}: its config has the pattern {pattern!r}, no regular expression ({error})") from None


def _part(model: nn.Module, layer: str, own: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> Part:
    if "lora_A.weight" not in own or "lora_B.weight" not in own:
        raise FileError(f"{source}: layer {layer!r} has {sorted(own)}, without its other half; nothing was loaded")
    dora = "lora_magnitude_vector" in own
    if dora != bool(config.get("use_dora")):
        raise FileError(
            f"{source}: layer {layer!r} has {'a' if dora else 'no'} magnitude where the config says "
            f"use_dora={config.get('use_dora')}; nothing was loaded"
        )
    A, B = own["lora_A.weight"], own["lora_B.weight"]
    r, alpha, scale = _rank_alpha_scale(layer, config, source)
    shape = tuple(find_slot(model.get_submodule(layer)).tensor.shape)  # type: ignore[union-attr]
    groups = groups_of(model.get_submodule(layer))
    ones = [1] * len(shape[2:])
    needed = ([r, shape[1] * groups, *shape[2:]], [shape[0], r // groups, *ones])
    if [list(A.shape), list(B.shape)] != list(needed):
        raise FileError(
            f"{source}: layer {layer!r} has lora_A {list(A.shape)} and lora_B {list(B.shape)} where its config and "
            f"this model ask for {needed[0]} and {needed[1]}; nothing was loaded"
        )
    B = B.flatten(1)
    if groups > 1:
        factors = peft_groups_to_im2col(A, B, groups)
        if dora or factors is None:
            what = "has wrong norms" if dora else "reads the inputs of all groups"
            raise FileError(
                f"{source}: layer {layer!r} has groups={groups}, on which PEFT's {'DoRA' if dora else 'lora_A'} {what}"
                ": no change of the layer's weight computes the same. Leave the layer out in PEFT"
            )
        A, B = factors
    tensors = {"A": A.flatten(1), "B": B}
    if dora:
        tensors["magnitude"] = own["lora_magnitude_vector"].flatten()
    # The same division as PEFT's, unless its rank counted every group's copy.
    rank, rslora = A.shape[0], bool(config.get("use_rslora"))
    return Part(rank, alpha if rank == r else alpha_for(scale, rank, A, rslora), tensors)


def _rank_alpha_scale(layer: str, config: Mapping[str, Any], source: str) -> tuple[int, float, float]:
    r = _by_pattern(config.get("rank_pattern"), layer, config.get("r", 8), source)
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8), source)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        raise FileError(f"{source}: its config gives layer {layer!r} rank {r!r} and alpha {alpha!r}")
    return r, alpha, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _by_pattern(pattern: Mapping[str, Any] | None, layer: str, default: Any, source: str) -> Any:
    # PEFT takes the first key that matches the end of the name, from a dot on.
    found = (key for key in pattern or () if _matches(rf"(.*\.)?({key})$", layer, source))
    key = next(found, None)
    return default if key is None else (pattern or {})[key]


def _bias(
    model: nn.Module, layer: str, bias: Tensor, config: Mapping[str, Any], trained: Mapping[str, Tensor]
) -> Tensor:
    module = model.get_submodule(layer)
    if not isinstance(module.bias, Tensor):
        raise FileError(f"layer {layer!r} has a lora_bias in the file but no bias in the model to add it to")
    base = trained.get(f"{layer}.bias", module.bias.detach())
    return base + _rank_alpha_scale(layer, config, "the file")[2] * bias.to(base)


def _own_name(key: str) -> str:
    return key.replace(".original_module.", ".").replace(".modules_to_save.", ".")


def _raw_matrix(model: nn.Module, layer: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts the raw 2-D parameter (`target_parameters`), which is W₀ + ΔW whatever the module does."""
    slot = find_slot(model.get_submodule(layer))
    named = [target for target in config.get("target_parameters") or () if f"{layer}.weight".endswith(target)]
    return bool(named) and slot is not None and slot.parameter == "weight" and slot.tensor.ndim == 2
