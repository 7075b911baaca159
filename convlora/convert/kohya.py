"""kohya's and LyCORIS's files, both ways: LoRA/LoCon, its Tucker form, DoRA on either axis, LoHa, LoKr.

One safetensors file with keys `<prefix>_<module name with _ for .>.<tensor>`. The module name cannot be read back from
that, so every layer name of the model is written the same way and looked up. Two names that come out the same
(`a.b_c`, `a_b.c`) are refused, where LyCORIS drops one. Scale: alpha/rank, the rank being the tensors' own; without an
alpha, or with alpha 0, it is 1. rsLoRA files have their alpha already multiplied by √rank.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlora import files
from convlora.adapter import Adapter
from convlora.attach import base_modules
from convlora.convert.common import Part, alpha_for, full_strength, low_rank, put, refuse_unless_plain
from convlora.convert.layouts import contract_hadamard
from convlora.errors import ConvloraError, FileError
from convlora.layers import Slot, find_slot
from convlora.methods import Change
from convlora.methods.dora import DoRA
from convlora.methods.loha import LoHa
from convlora.methods.lokr import LoKr, split
from convlora.methods.tucker import Tucker, contract

# {convlora's method: the tensors of one layer, those in brackets of the file format optional}
_KINDS: dict[str, tuple[set[str], set[str]]] = {
    "lora": ({"lora_down.weight", "lora_up.weight"}, {"alpha"}),
    "tucker": ({"lora_down.weight", "lora_up.weight", "lora_mid.weight"}, {"alpha"}),
    "dora": ({"lora_down.weight", "lora_up.weight", "dora_scale"}, {"alpha", "lora_mid.weight"}),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"alpha", "hada_t1", "hada_t2"}),
    "lokr": (set(), {"alpha", "lokr_t2", *(f"lokr_w{side}{end}" for side in "12" for end in ("", "_a", "_b"))}),
}


def from_kohya(model: nn.Module, file: str | Path, name: str = "default", prefix: str | None = None) -> Adapter:
    """Put an adapter from a kohya or LyCORIS file on the same base model; on any error the model stays as it was.

    LoRA becomes "lora", its Tucker form "tucker", DoRA "dora" (`axis` as in the file), LoHa "loha", LoKr "lokr",
    with the file's own alpha and no loss. Tucker forms that convlora has no method for (of LoHa, of LoKr, of DoRA, or
    beside plain LoRA convolutions) are multiplied out: the same ΔW, to rounding.

    Args:
        name: the adapter's name on this model.
        prefix: of the keys, such as "lycoris", "lora_unet" or "lora_te1". None: the file must hold a single one, and
            all of its keys are used. Given, it selects: the other models' keys in the file are left out.

    Raises:
        FileError: the file is missing, damaged, of a method convlora has not got, of several methods, or has a key
            that is no layer of this model.
        ConvloraError: the adapter's name is taken, two layer names come out the same, or LyCORIS computes something
            else than with W₀ + ΔW on a layer.
    """
    tensors, _ = files.read(Path(file))
    source = str(file)
    stems: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, dot, rest = key.partition(".")
        if not dot or "_" not in stem:
            raise FileError(f"{source}: key {key!r} is not of the form <prefix>_<module>.<tensor>; nothing was loaded")
        stems.setdefault(stem, {})[rest] = tensor
    if prefix is not None:
        stems = {stem: own for stem, own in stems.items() if stem.startswith(f"{prefix}_")}
    names = _layer_names(model, stems, prefix, source)
    layers = {names[stem]: own for stem, own in stems.items()}
    kinds = {layer: _kind(own, layer, source) for layer, own in layers.items()}
    method = _method(kinds, layers, source)
    refuse_unless_plain(model, layers, "LyCORIS", by_weight=True)
    slots: dict[str, Slot] = {layer: find_slot(model.get_submodule(layer)) for layer in layers}  # type: ignore[misc]
    read = {"lora": _lora, "tucker": _tucker, "dora": _dora, "loha": _loha, "lokr": _lokr}[method]
    try:
        parts = {layer: read(own, slots[layer].shape) for layer, own in layers.items()}
        options = {"relative": False, **_options(method, layers, slots)}
    except (RuntimeError, ValueError, IndexError, KeyError) as error:  # shapes that do not multiply
        raise FileError(f"{source} does not fit this {type(model).__name__}: {error}; nothing was loaded") from None
    return put(model, name, source, method, parts, options)


def to_kohya(adapter: Adapter, file: str | Path, prefix: str = "lycoris", dtype: torch.dtype | None = None) -> Path:
    """Write an adapter as a file that LyCORIS's `create_lycoris_from_weights` loads.

    "lora", "tucker", "dora", "loha" and "lokr" keep their tensors; any other change that is a product of two factors
    is written as exactly these, as a LoRA. Scale and strength go into alpha.

    Args:
        prefix: "lycoris" is LyCORIS's own; Stable Diffusion programs look for "lora_unet", "lora_te", ….
        dtype: of the tensors in the file; None keeps theirs.

    Raises:
        ConvloraError: the format cannot hold it: the change has no low rank, there are tensors trained in full, two
            layer names come out the same, or LyCORIS does not adapt the layer (transposed, raw, normalised weights).
    """
    layers = adapter.layers
    if adapter.trained or adapter.record.buffers:
        raise ConvloraError(
            f"kohya's format has no place for tensors trained in full ({[*adapter.trained][:3]}); use adapter.save(), "
            "or to_peft() for whole modules"
        )
    if not prefix.isidentifier():
        raise ConvloraError(f"prefix= is a plain word such as 'lycoris' or 'lora_unet', not {prefix!r}")
    refuse_unless_plain(adapter.model, layers, "LyCORIS", by_weight=True)
    mangled = _mangled(adapter.model)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = list[int](), list[float]()
    for layer, change in layers.items():
        same = mangled[_mangle(layer)]
        if len(same) > 1:
            raise ConvloraError(_collision(same))
        rank, alpha, own = _written(adapter, layer, change)
        own = {key: files.cast(tensor.contiguous(), dtype) for key, tensor in own.items()}
        tensors |= {f"{prefix}_{_mangle(layer)}.{key}": tensor for key, tensor in own.items()}
        tensors[f"{prefix}_{_mangle(layer)}.alpha"] = _alpha_tensor(alpha, rank, next(iter(own.values())))
        ranks.append(rank)
        alphas.append(alpha)
    algo = {"loha": "loha", "lokr": "lokr"}.get(adapter.method, "lora")
    metadata = {
        "format": "pt",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": f"{alphas[ranks.index(max(ranks))]:g}",
        "ss_network_args": json.dumps({"algo": algo}),
    }
    return files.write(file, tensors, metadata)


# ------------------------------------------------------------------------------------------------------- names


def _mangle(name: str) -> str:
    return name.replace(".", "_")


def _mangled(model: nn.Module) -> dict[str, list[str]]:
    """`{mangled name: layer names that come out as it}` of all adaptable layers."""
    found: dict[str, list[str]] = {}
    for name, module in base_modules(model):
        if find_slot(module) is not None:
            found.setdefault(_mangle(name), []).append(name)
    return found


def _collision(same: Iterable[str]) -> str:
    shown = " and ".join(map(repr, same))
    return f"layers {shown} both come out as {_mangle(next(iter(same)))!r} in kohya's format; rename one of them"


def _layer_names(model: nn.Module, stems: Iterable[str], prefix: str | None, source: str) -> dict[str, str]:
    """`{stem of a key: layer name}`; every stem must be found, under one and the same prefix."""
    mangled, stems = _mangled(model), list(stems)
    if not stems:
        which = "tensors" if prefix is None else f"keys that begin with {prefix + '_'!r}"
        raise FileError(f"{source} holds no {which}; nothing was loaded")
    candidates = [prefix] if prefix is not None else _prefixes(stems, mangled)
    missing = {p: [s for s in stems if not (s.startswith(f"{p}_") and s[len(p) + 1 :] in mangled)] for p in candidates}
    fitting = [p for p in candidates if not missing[p]]
    if len(fitting) > 1:
        raise FileError(f"{source}: its keys fit the prefixes {fitting}; say which with prefix=; nothing was loaded")
    if not fitting:
        best = min(candidates, key=lambda p: len(missing[p])) if candidates else None
        unknown = stems if best is None else missing[best]
        under = "" if best is None else f" under prefix {best!r}"
        known = [f"{best or '<prefix>'}_{name}" for name in mangled]
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0)
        raise FileError(
            f"{source}: {len(unknown)} of {len(stems)} keys are no layer of this {type(model).__name__}{under}: "
            f"{unknown[:3]}; its layers are written as {near[0]!r} and so on; nothing was loaded. If the file holds "
            "several models, choose one with prefix="
        )
    names = {stem: mangled[stem[len(fitting[0]) + 1 :]] for stem in stems}
    for same in names.values():
        if len(same) > 1:
            raise ConvloraError(_collision(same))
    return {stem: same[0] for stem, same in names.items()}


def _prefixes(stems: list[str], mangled: Iterable[str]) -> list[str]:
    """Every beginning of the first key that leaves the name of a layer, and those of the keys that have none."""
    for stem in stems:
        found = [stem[: -len(name) - 1] for name in mangled if stem.endswith(f"_{name}") and len(stem) > len(name) + 1]
        if found:
            return sorted(found)
    return []


# ----------------------------------------------------------------------------------------------------- methods


def _kind(own: Mapping[str, Tensor], layer: str, source: str) -> str:
    for kind, (needed, optional) in _KINDS.items():
        if needed <= set(own) <= needed | optional and (kind != "lokr" or _has_both_sides(own)):
            return kind
    raise FileError(
        f"{source}: layer {layer!r} has {sorted(own)}, which is no whole set of LoRA, DoRA, LoHa or LoKr tensors; "
        "nothing was loaded"
    )


def _has_both_sides(own: Mapping[str, Tensor]) -> bool:
    return all((f"lokr_w{s}" in own) != (f"lokr_w{s}_a" in own and f"lokr_w{s}_b" in own) for s in "12")


def _method(kinds: Mapping[str, str], layers: Mapping[str, Mapping[str, Tensor]], source: str) -> str:
    """One method for all layers: Tucker's covers plain LoRA with one kernel position, and LoRA covers both."""
    found = set(kinds.values())
    if found == {"lora", "tucker"}:
        spread = (layers[layer]["lora_down.weight"] for layer, kind in kinds.items() if kind == "lora")
        return "lora" if any(down[0, 0].numel() > 1 for down in spread) else "tucker"
    if len(found) > 1:
        some = {kind: next(layer for layer, k in kinds.items() if k == kind) for kind in sorted(found)}
        raise FileError(f"{source} mixes methods, such as {some}; convlora has one per adapter; nothing was loaded")
    return found.pop()


def _file_alpha(own: Mapping[str, Tensor], rank: int) -> float:
    alpha = float(own["alpha"]) if "alpha" in own else 0.0
    return alpha or float(rank)


def _down(own: Mapping[str, Tensor]) -> Tensor:
    down = own["lora_down.weight"].flatten(1)
    return contract(own["lora_mid.weight"], down) if "lora_mid.weight" in own else down


def _lora(own: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    A, B = _down(own), own["lora_up.weight"].flatten(1)
    return Part(A.shape[0], _file_alpha(own, A.shape[0]), {"A": A, "B": B})


def _tucker(own: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    V, U = own["lora_down.weight"].flatten(1), own["lora_up.weight"].flatten(1)
    core = {"core": own["lora_mid.weight"]} if "lora_mid.weight" in own else {}
    return Part(V.shape[0], _file_alpha(own, V.shape[0]), {"U": U, "V": V, **core})


def _dora(own: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    part = _lora(own, shape)
    return part._replace(tensors={**part.tensors, "magnitude": own["dora_scale"].flatten()})


def _loha(own: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    tensors: dict[str, Tensor] = {}
    for side in "12":
        a, b = own[f"hada_w{side}_a"], own[f"hada_w{side}_b"].flatten(1)
        if f"hada_t{side}" in own:
            a, b = contract_hadamard(own[f"hada_t{side}"], a, b)
        tensors |= {f"w{side}_a": a, f"w{side}_b": b}
    rank = tensors["w1_b"].shape[0]
    return Part(rank, _file_alpha(own, rank), tensors)


def _lokr(own: Mapping[str, Tensor], shape: tuple[int, ...]) -> Part:
    tensors = {key.removeprefix("lokr_"): tensor.flatten(1) for key, tensor in own.items() if key[:6] == "lokr_w"}
    if "lokr_t2" in own:
        tensors["w2_a"], tensors["w2_b"] = contract_hadamard(own["lokr_t2"], tensors["w2_a"], tensors["w2_b"])
    ranks = {tensors[key].shape[0] for key in ("w1_b", "w2_b") if key in tensors}
    if not ranks:  # both in full: the scale is 1 whatever alpha says, and the rank any that makes them so
        return Part(max(*tensors["w1"].shape, *tensors["w2"].shape), None, tensors)
    rank = ranks.pop()
    return Part(rank, _file_alpha(own, rank), tensors)


def _options(method: str, layers: Mapping[str, Mapping[str, Tensor]], slots: Mapping[str, Slot]) -> dict[str, Any]:
    if method == "dora":
        axes = {layer: _axis(own["dora_scale"], slots[layer].shape) for layer, own in layers.items()}
        certain = {axis for axis in axes.values() if axis != "either"}
        if len(certain) > 1:
            raise ValueError(f"dora_scale is per output on some layers and per input on others ({axes})")
        return {"axis": (certain or {"out"}).pop()}
    if method == "lokr":
        return _kronecker({layer: _lokr(own, slots[layer].shape) for layer, own in layers.items()}, slots)
    return {}


def _axis(scale: Tensor, shape: tuple[int, ...]) -> str:
    """Which dimension a `dora_scale` (out, 1, …) or (1, in, …) runs along."""
    fits = {"out": [shape[0], 1], "in": [1, shape[1]]}
    axes = [axis for axis, size in fits.items() if list(scale.shape) == size + [1] * len(shape[2:])]
    if not axes:
        raise ValueError(f"dora_scale has shape {list(scale.shape)} on a weight of shape {list(shape)}")
    return axes[0] if len(axes) == 1 else "either"


def _kronecker(parts: Mapping[str, Part], slots: Mapping[str, Slot]) -> dict[str, Any]:
    """The `factor` and `decompose_both` under which LoKr cuts every layer as the file does."""
    both = any("w1_a" in part.tensors for part in parts.values())
    cuts = []
    for layer, (_, _, tensors) in parts.items():
        w1 = tensors["w1"].shape if "w1" in tensors else (tensors["w1_a"].shape[0], tensors["w1_b"].shape[1])
        cuts.append((slots[layer].shape[0], w1[0], slots[layer].shape[1], w1[1]))
    largest = max(max(o1, i1) for _, o1, _, i1 in cuts)
    for factor in (-1, *range(1, largest + 1)):
        if all(split(out, factor)[0] == o1 and split(inputs, factor)[0] == i1 for out, o1, inputs, i1 in cuts):
            return {"factor": factor, "decompose_both": both}
    raise ValueError(f"no LoKr factor cuts (out, o1, in, i1) = {cuts[:3]} as the file does")


# ----------------------------------------------------------------------------------------------------- writing


def _written(adapter: Adapter, layer: str, change: Change) -> tuple[int, float, dict[str, Tensor]]:
    """(rank, alpha, tensors) of one layer as LyCORIS names them."""
    shape = adapter.record.slot(adapter.model, layer).shape
    kernel, ones = shape[2:], [1] * len(shape[2:])
    strength = float(change.strength)
    state = {key: tensor.detach() for key, tensor in change.state_dict().items()}
    if not strength and isinstance(change, (Tucker, LoHa, LoKr)):  # alpha 0 would mean alpha = rank
        state |= {key: torch.zeros_like(state[key]) for key in ("U", "w2", "w2_a") if key in state}
        strength = 1.0
    if isinstance(change, Tucker):
        rank, alpha = _rank_and_alpha(state["V"], float(change.scale) * strength)
        own = {
            "lora_down.weight": state["V"].reshape(rank, -1, *ones),
            "lora_up.weight": state["U"].reshape(-1, rank, *ones),
        }
        return rank, alpha, own | ({"lora_mid.weight": state["core"]} if "core" in state else {})
    if isinstance(change, LoHa):
        rank, alpha = _rank_and_alpha(state["w1_b"], float(change.scale) * strength)
        return rank, alpha, {f"hada_{key}": tensor for key, tensor in state.items() if key != "scale"}
    if isinstance(change, LoKr):
        return _written_lokr(state, float(change.scale) * strength, shape)
    if isinstance(change, DoRA):
        full_strength(adapter, change, layer, "kohya's format")
        size = [shape[0], 1] if change.sums == (1, 2) else [1, shape[1]]
        A, B, scale = state["A"], state["B"], float(change.scale)
        extra = {"dora_scale": state["magnitude"].reshape(*size, *ones)}
    else:
        A, B, scale = low_rank(adapter, layer, "kohya's format")
        extra = {}
    rank, alpha = _rank_and_alpha(A, scale)
    own = {"lora_down.weight": A.reshape(rank, -1, *kernel), "lora_up.weight": B.reshape(-1, rank, *ones)}
    return rank, alpha, own | extra


def _written_lokr(
    state: Mapping[str, Tensor], scale: float, shape: tuple[int, ...]
) -> tuple[int, float, dict[str, Tensor]]:
    own = {f"lokr_{key}": tensor for key, tensor in state.items() if key != "scale"}
    if "lokr_w2" in own:
        own["lokr_w2"] = own["lokr_w2"].unflatten(1, (-1, *shape[2:])) if shape[2:] else own["lokr_w2"]
    factor = own.get("lokr_w1_b", own.get("lokr_w2_b"))
    if factor is None:  # both in full: LyCORIS's scale is 1 whatever alpha says
        own["lokr_w1"] = own["lokr_w1"] * scale if scale != 1 else own["lokr_w1"]
        return 1, 1.0, own
    return *_rank_and_alpha(factor, scale), own


def _rank_and_alpha(factor: Tensor, scale: float) -> tuple[int, float]:
    return factor.shape[0], alpha_for(scale, factor.shape[0], factor)


def _alpha_tensor(alpha: float, rank: int, like: Tensor) -> Tensor:
    """In float32, as everywhere, unless that would change the scale."""
    single = torch.tensor(alpha, dtype=torch.float32)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    same = torch.equal(torch.tensor(float(single) / rank, dtype=wide), torch.tensor(alpha / rank, dtype=wide))
    return single if same else torch.tensor(alpha, dtype=torch.float64)
