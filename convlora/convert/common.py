"""What all conversions share: from an adapter to plain factors, and from another library's tensors to an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convlora.adapter import Adapter
from convlora.attach import base_modules, base_parameters, frozen
from convlora.convert.layouts import loralib_to_im2col
from convlora.errors import ConvloraError, FileError
from convlora.fingerprint import fingerprint
from convlora.inject import build, check_name, fill, install
from convlora.layers import as_matrix, find_slot, own_class
from convlora.methods import Change, LoRA, LowRankChange
from convlora.methods.change import settled
from convlora.methods.loralib_view import LoralibView
from convlora.record import Record
from convlora.targets import select_parameters

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Part(NamedTuple):
    """One layer of another library's adapter, with the tensors named as convlora's method has them."""

    rank: int
    alpha: float | None
    tensors: dict[str, Tensor]


class Factors(NamedTuple):
    """ΔW = scale·B·A with A `(r, cols)` and B `(out, r)`."""

    A: Tensor
    B: Tensor
    scale: float


def put(
    model: nn.Module,
    name: str,
    source: str,
    method: str,
    parts: Mapping[str, Part],
    options: Mapping[str, Any] | None = None,
    trained: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Attach an adapter with these tensors; `source` is named in errors, after which the model is as it was.

    `trained` are parameters and buffers of the model, by name, with the values they were trained to.
    """
    check_name(model, name)
    parts = {layer: parts[layer] for layer, _ in base_modules(model) if layer in parts}  # in model order
    trained = dict(trained or {})
    parameters, buffers = _parameters_and_buffers(model, trained, source)
    alphas = {layer: part.alpha for layer, part in parts.items()}
    same = len(set(alphas.values())) == 1
    how = {"alpha": next(iter(alphas.values())) if same else alphas, "rank_per": "matrix", "path": "auto"}
    ranks = {layer: (part.rank, part.rank) for layer, part in parts.items()}
    record = Record(name, method, ranks, {**(options or {}), **how}, parameters, buffers, fingerprint(model))
    twice = {f"{layer}.weight" for layer in parts} & set(parameters)
    if twice:
        raise FileError(f"{source}: {sorted(twice)[0]!r} is both adapted and trained in full; nothing was loaded")
    try:
        changes, fulls = build(model, record)
    except (AttributeError, TypeError, ConvloraError) as error:
        raise FileError(f"{source} does not fit this {type(model).__name__}: {error}; nothing was loaded") from None
    given = {f"{layer}/{key}": tensor for layer, part in parts.items() for key, tensor in part.tensors.items()}
    given |= {f"train/{key}": tensor for key, tensor in trained.items()}
    # built from rank and alpha, not given
    given |= {
        f"{layer}/scale": change.state_dict()["scale"]
        for layer, change in changes.items()
        if "scale" in change.state_dict()
    }
    return install(model, record, changes, fulls, fill(model, record, changes, fulls, given, source))


def groups_of(module: nn.Module) -> int:
    """The groups of a convolution; 1 for other layers."""
    groups = getattr(module, "groups", 1)
    return groups if isinstance(groups, int) else 1


def known_layers(model: nn.Module, layers: Iterable[str], source: str) -> None:
    """Raise `FileError` unless every one of these is an adaptable layer of the model."""
    have = {name for name, module in base_modules(model) if find_slot(module) is not None}
    foreign = [layer for layer in layers if layer not in have]
    if foreign:
        raise FileError(
            f"{source} holds tensors for {_some(foreign)}, which this {type(model).__name__} has not got as layers "
            f"that can be adapted (it has {_some(list(have)) or 'none'}); nothing was loaded"
        )


def why_not(module: nn.Module, by_weight: bool) -> str | None:
    """Why a library for torch's own layers computes something else than with W₀ + ΔW on this layer, or None.

    `by_weight`: it computes with the changed weight, as LyCORIS does; otherwise with two convolutions of its own,
    as PEFT does, which leave out dilation.
    """
    cls: Any = own_class(module)
    slot = find_slot(module)
    if slot is not None and (slot.owner is not module or slot.parameter != "weight"):
        return "its weight is normalised at run time, and they add their change after that, not under it"
    if isinstance(module, nn.Linear):
        return None if cls.forward is nn.Linear.forward else f"{cls.__name__} uses its weight in a way of its own"
    if not isinstance(module, CONVS):
        return f"a {cls.__name__} is none of the layers they adapt: nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d"
    if cls not in CONVS:
        return f"{cls.__name__} is a subclass of torch's convolution, which they treat as the plain one"
    if module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):  # type: ignore[arg-type]
        return f"they drop padding_mode={module.padding_mode!r} and so compute another function"
    dilated = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size))  # type: ignore[arg-type]
    if dilated and not by_weight:
        return f"they drop dilation={module.dilation} and so compute another function"
    return None


def refuse_unless_plain(model: nn.Module, layers: Iterable[str], library: str, by_weight: bool) -> None:
    """Raise unless the other library computes W₀ + ΔW on all of these layers."""
    for layer in layers:
        if reason := why_not(model.get_submodule(layer), by_weight):
            raise ConvloraError(f"layer {layer!r} cannot be shared with {library}: {reason}")


def low_rank(adapter: Adapter, layer: str, library: str) -> Factors:
    """The exact factors of one layer at its present strength; an error for changes that have none."""
    change = adapter.layers[layer]
    strength = float(change.strength)
    slot = adapter.record.slot(adapter.model, layer)
    if isinstance(change, LoRA) and change.A0 is None:
        return _nonzero(change.A.detach(), change.B.detach(), float(change.scale) * strength)
    if isinstance(change, LoralibView):
        groups = change.A.shape[1] // math.prod(slot.shape[1:3])
        A, B = loralib_to_im2col(change.A.detach(), change.B.detach(), slot.shape, groups)
        return _nonzero(A, B, float(change.scale) * strength)
    if not isinstance(change, LowRankChange):
        raise ConvloraError(
            f"layer {layer!r}: {library} cannot hold the change of method {adapter.method!r}, which is no product of "
            f"two factors. Compress it to a LoRA first: convlora.compose(model, {{{adapter.name!r}: 1.0}}, "
            'how="svd", rank=…)'
        )
    with torch.no_grad(), settled(change):
        left, right = change.factors(as_matrix(frozen(slot, adapter.name), slot.owner))
    kept = ((left != 0).any(0) & (right != 0).any(1)).nonzero().flatten()  # AdaLoRA's pruned ones are exactly zero
    kept = kept if len(kept) else torch.zeros(1, dtype=torch.long, device=left.device)
    return _nonzero(right[kept], left[:, kept], strength)


def _nonzero(A: Tensor, B: Tensor, scale: float) -> Factors:
    # An alpha of 0 means "alpha = rank" to kohya's readers: a change switched off is written as B = 0.
    return Factors(A, B, scale) if scale else Factors(A, torch.zeros_like(B), 1.0)


def trained_values(adapter: Adapter) -> dict[str, Tensor]:
    """`{parameter or buffer: value}` of `train=`, at the present strength."""
    values = {}
    for name, full in adapter.trained.items():
        value = full.value.detach()
        if float(full.strength) != 1:
            base = frozen(adapter.record.parameter_slot(adapter.model, name), adapter.name)
            value = base + full.strength * (value - base)
        values[name] = value
    state = adapter.state_dict()
    return values | {name: state[f"train/{name}"] for name in adapter.record.buffers}


def full_strength(adapter: Adapter, change: Change, layer: str, library: str) -> None:
    """Raise where a strength other than 1 cannot be written into the tensors."""
    if float(change.strength) != 1:
        raise ConvloraError(
            f"layer {layer!r} has strength {float(change.strength):g}, which {library} has no place for with method "
            f"{adapter.method!r}; set_strength(1) first"
        )


def alpha_for(scale: float, rank: int, like: Tensor, rslora: bool = False) -> float:
    """The alpha that gives `scale` back, bit for bit in `like`'s precision: the roundest such number."""
    share = math.sqrt(rank) if rslora else rank
    wanted = torch.tensor(scale, dtype=like.dtype)
    for digits in range(7):
        alpha = round(scale * share, digits)
        if torch.equal(torch.tensor(alpha / share, dtype=like.dtype), wanted):
            return alpha
    return scale * share


def _parameters_and_buffers(model: nn.Module, names: Mapping[str, Tensor], source: str) -> tuple[list[str], list[str]]:
    known = {name for name, _ in base_parameters(model)}
    buffers = [
        name
        for name in names
        if name not in known and name.rpartition(".")[2] in _buffers_of(model, name.rpartition(".")[0])
    ]
    foreign = [name for name in names if name not in known and name not in buffers]
    if foreign:
        raise FileError(
            f"{source} holds {_some(foreign)}, which is no tensor of this {type(model).__name__}; nothing was loaded"
        )
    parameters = [name for name in names if name in known]
    return (list(select_parameters(model, parameters)) if parameters else []), buffers


def _buffers_of(model: nn.Module, module: str) -> dict[str, Tensor | None]:
    try:
        return dict(model.get_submodule(module)._buffers)
    except AttributeError:
        return {}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
