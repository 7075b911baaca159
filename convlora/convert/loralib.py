"""microsoft/LoRA's (loralib's) state dicts of linear layers and 2-D convolutions: read, exactly.

Keys `<module>.lora_A` and `<module>.lora_B`; on a convolution A is `(r·k, in·k)` and B `(out/groups·k, r·k)`, and B·A
is read row by row as `(out, in/groups, k, k)`, times alpha/r. Neither alpha nor r is in the file. That is no low-rank
matrix of rank r in convlora's sense: its exact factors on the im2col matrix have rank r·k² (r·k²·groups).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convlora import files
from convlora.adapter import Adapter
from convlora.convert.common import Part, alpha_for, groups_of, known_layers, put
from convlora.convert.layouts import loralib_to_im2col
from convlora.errors import ConvloraError, FileError
from convlora.layers import find_slot
from convlora.methods.loralib_view import square


def from_loralib(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | str | Path,
    alpha: float | Mapping[str, float],
    r: int | None = None,
    name: str = "default",
    *,
    keep_layout: bool = False,
) -> Adapter:
    """Put what `loralib.lora_state_dict(model)` gave on the same model with plain layers.

    Args:
        state_dict: the dictionary, or a safetensors file of it. convlora does not unpickle; for a `.pt` file pass
            `torch.load(path, weights_only=True)`.
        alpha: `lora_alpha` of the layers, which the tensors do not tell; loralib's own default is 1. `{glob: alpha}`
            where they differ, first match wins.
        r: the rank, to check the tensors against; None reads it off them.
        keep_layout: keep the tensors as they are, as method "loralib_view", instead of method "lora" of rank r·k².

    Raises:
        FileError: a key that is no layer of this model, half a layer, or shapes that are not loralib's.
        ConvloraError: the name is taken, or a glob of alpha matches nothing.
    """
    source = "the state dict" if isinstance(state_dict, Mapping) else str(state_dict)
    tensors = dict(state_dict) if isinstance(state_dict, Mapping) else files.read(Path(state_dict))[0]
    layers: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if kind in ("lora_A", "lora_B"):
            layers.setdefault(layer, {})[kind] = tensor
        elif kind == "bias":  # lora_state_dict(bias="all" | "lora_only"); loralib's convolutions keep theirs in `.conv`
            trained[key.removesuffix(".conv.bias") + ".bias" if key.endswith(".conv.bias") else key] = tensor
        else:
            raise FileError(
                f"{source}: key {key!r} is neither lora_A, lora_B nor a bias. A whole state dict may hold weights with "
                "the change already merged in (loralib merges in eval()), which would count twice: pass "
                "loralib.lora_state_dict(model); nothing was loaded"
            )
    if not layers:
        raise FileError(f"{source} holds no key that ends in .lora_A or .lora_B; nothing was loaded")
    known_layers(model, layers, source)
    parts = {layer: _part(model, layer, own, _alpha(layer, alpha, layers), r, source) for layer, own in layers.items()}
    options: dict[str, Any] = {"relative": False}
    if not keep_layout:
        im2col = {layer: _im2col(model, layer, part) for layer, part in parts.items()}
        return put(model, name, source, "lora", im2col, options, trained)
    groups = {groups_of(model.get_submodule(layer)) for layer in layers}
    if len(groups) > 1:
        raise ConvloraError(f"keep_layout=True needs the same groups on every layer, not {sorted(groups)}")
    return put(model, name, source, "loralib_view", parts, {**options, "groups": groups.pop()}, trained)


def _part(model: nn.Module, layer: str, own: Mapping[str, Tensor], alpha: float, r: int | None, source: str) -> Part:
    if set(own) != {"lora_A", "lora_B"}:
        raise FileError(f"{source}: layer {layer!r} has {sorted(own)} without its other half; nothing was loaded")
    module = model.get_submodule(layer)
    slot = find_slot(module)
    assert slot is not None  # known_layers looked
    out, inputs, k = square(slot.shape)
    A, B, groups = own["lora_A"], own["lora_B"], groups_of(module)
    rank = r if r is not None else A.shape[0] // k
    needed = [[rank * k, inputs * groups * k], [out // groups * k, rank * k]]
    if rank < 1 or [list(A.shape), list(B.shape)] != needed:
        raise FileError(
            f"{source}: layer {layer!r} has lora_A {list(A.shape)} and lora_B {list(B.shape)} where loralib's rank "
            f"{rank} has {needed[0]} and {needed[1]} on a weight {list(slot.shape)}; nothing was loaded"
        )
    return Part(rank, alpha, {"A": A, "B": B})


def _im2col(model: nn.Module, layer: str, part: Part) -> Part:
    slot = find_slot(model.get_submodule(layer))
    assert slot is not None and part.alpha is not None
    A, B = loralib_to_im2col(part.tensors["A"], part.tensors["B"], slot.shape, groups_of(model.get_submodule(layer)))
    scale = part.alpha / part.rank
    return Part(A.shape[0], alpha_for(scale, A.shape[0], A), {"A": A, "B": B})


def _alpha(layer: str, alpha: float | Mapping[str, float], layers: Mapping[str, Any]) -> float:
    if not isinstance(alpha, Mapping):
        return alpha
    for glob in alpha:
        if not any(fnmatch.fnmatchcase(name, glob) for name in layers):
            raise ConvloraError(f"alpha: {glob!r} matches none of the layers {list(layers)}")
    found = next((value for glob, value in alpha.items() if fnmatch.fnmatchcase(layer, glob)), None)
    if found is None:
        raise ConvloraError(f"alpha= says nothing for layer {layer!r}; add {{'*': …}} for all others")
    return found
