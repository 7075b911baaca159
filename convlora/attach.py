"""Attach changes to a model and undo it. This is the only place that changes a model.

In words: a module whose weight is adapted gets a generated subclass of its own class, on which the weight is
a property, `w0 + Σ strength·ΔW`. The frozen tensor stays where it was (`_parameters`), so the base keys of
the state dict stay as they were; the changes are registered beside it as `convlora.<parameter>.<adapter>`.
The subclass keeps `isinstance`, `deepcopy`, pickling, hooks and `torch.compile` working. Merging puts a new
tensor in the frozen one's place and takes the change away; unmerging puts the very same tensor back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.factored import LowRankWeight
from convlora.layers import LowRankForward, Slot, as_matrix, own_class
from convlora.methods.change import Change, LowRankChange, settled

CONTAINER = "convlora"  # the submodule that holds a module's changes
_ROUTES = "_convlora_routes"  # in the owner's __dict__: {(parameter, adapter): low-rank forward} that changes brought
_MERGED = "_convlora_merged"  # in the owner's __dict__: what merging put aside, newest last


class Changes(nn.ModuleDict):
    """`{parameter: {adapter: Change}}`, the changes of one module's own tensors."""


class Merged(NamedTuple):
    parameter: str
    adapter: str
    original: nn.Parameter
    change: Change
    low_rank: LowRankForward | None
    later: list[str]  # the adapters beside which it stood before: a sum is rounded in their order


def attach(slot: Slot, adapter: str, change: Change, low_rank: LowRankForward | None = None) -> None:
    """Let `change` act on the slot's tensor under the adapter's name; `low_rank` replaces the module's forward."""
    owner, parameter = slot
    if CONTAINER not in owner._modules:
        owner.add_module(CONTAINER, Changes())
    container = cast(Changes, owner._modules[CONTAINER])
    if parameter not in container:
        container[parameter] = nn.ModuleDict()
    named = cast(nn.ModuleDict, container[parameter])
    if adapter in named:
        raise ConvloraError(f"{type(owner).__name__}.{parameter} already has a change named {adapter!r}")
    change.strength = change.strength.to(slot.tensor.device)
    change.train(owner.training)
    named[adapter] = change
    if low_rank is not None:
        owner.__dict__.setdefault(_ROUTES, {})[parameter, adapter] = low_rank
    _set_class(owner)


def detach(slot: Slot, adapter: str) -> Change:
    """Take a change away; with the last one the module gets its own class and keys back."""
    owner, parameter = slot
    container = cast(Changes, owner._modules[CONTAINER])
    named = cast(nn.ModuleDict, container[parameter])
    change = cast(Change, named.pop(adapter))
    if not len(named):
        del container[parameter]
    if not len(container):
        del owner._modules[CONTAINER]
    routes: _Routes = owner.__dict__.get(_ROUTES, {})
    routes.pop((parameter, adapter), None)
    if not routes:
        owner.__dict__.pop(_ROUTES, None)
    _set_class(owner)
    return change


def find_change(slot: Slot, adapter: str) -> Change | None:
    """The change of this name, attached or merged, or None."""
    entry = _merged_entry(slot, adapter)
    if entry is not None:
        return entry.change
    return next((change for name, change in _changes(slot.owner, slot.parameter) if name == adapter), None)


def merge(slot: Slot, adapter: str, keep: bool = True) -> None:
    """Replace the frozen tensor by the effective one of this change alone; `keep` remembers how to undo it."""
    owner, parameter = slot
    original = cast(nn.Parameter, slot.tensor)
    low_rank = owner.__dict__.get(_ROUTES, {}).get((parameter, adapter))
    change = find_change(slot, adapter)
    assert change is not None
    names = [name for name, _ in _changes(owner, parameter)]
    later = names[names.index(adapter) + 1 :]
    with torch.no_grad(), settled(change):
        merged = _effective(owner, original, [change])
    detach(slot, adapter)
    owner._parameters[parameter] = nn.Parameter(merged, requires_grad=original.requires_grad)
    if keep:
        owner.__dict__.setdefault(_MERGED, []).append(Merged(parameter, adapter, original, change, low_rank, later))


def unmerge(slot: Slot, adapter: str) -> None:
    """Put back the tensor that `merge` replaced, bit for bit, and the change beside it."""
    owner, parameter = slot
    entries: list[Merged] = owner.__dict__.get(_MERGED, [])
    mine = [entry for entry in entries if entry.parameter == parameter]
    if not mine or mine[-1].adapter != adapter:
        last = mine[-1].adapter if mine else None
        raise ConvloraError(
            f"adapter {adapter!r} is not the last one merged into this model"
            + (f": unmerge {last!r} first" if last else "")
        )
    entry = mine[-1]
    current = slot.tensor
    # The model may have moved to another device or precision while the original lay aside.
    entry.original.data = entry.original.data.to(current.device, current.dtype)
    entry.change.to(current.device)
    entries.remove(entry)
    if not entries:
        del owner.__dict__[_MERGED]
    owner._parameters[parameter] = entry.original
    attach(slot, adapter, entry.change, entry.low_rank)
    named = cast(nn.ModuleDict, cast(Changes, owner._modules[CONTAINER])[parameter])._modules
    for name in entry.later:
        if name in named:
            named[name] = named.pop(name)


def is_merged(slot: Slot, adapter: str) -> bool:
    return _merged_entry(slot, adapter) is not None


def frozen(slot: Slot, adapter: str) -> Tensor:
    """The tensor W₀ that this adapter's change is added to, also while it is merged."""
    entry = _merged_entry(slot, adapter)
    return (slot.tensor if entry is None else entry.original).detach()


def _merged_entry(slot: Slot, adapter: str) -> Merged | None:
    entries = slot.owner.__dict__.get(_MERGED, ())
    return next((e for e in entries if (e.parameter, e.adapter) == (slot.parameter, adapter)), None)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without convlora's own."""
    skipped: str | None = None
    for name, module in model.named_modules():
        if isinstance(module, Changes):
            skipped = name + "."
        elif skipped is None or not name.startswith(skipped):
            yield name, module


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters()` without convlora's own: the frozen (or merged) tensors under their own names."""
    for prefix, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}" if prefix else name, parameter


# ---------------------------------------------------------------------------------------- the generated class


#: A low-rank forward and the parameter whose changes it computes with.
_Route: TypeAlias = "tuple[LowRankForward, str]"
_Routes: TypeAlias = "dict[tuple[str, str], LowRankForward]"


def _set_class(owner: nn.Module) -> None:
    container = owner._modules.get(CONTAINER)
    if container is None:
        owner.__class__ = own_class(owner)
        return
    routes: _Routes = owner.__dict__.get(_ROUTES, {})
    route = next(((low_rank, parameter) for (parameter, _), low_rank in routes.items()), None)
    owner.__class__ = _adapted_class(cast(Any, own_class(owner)), tuple(cast(Changes, container)), route)


def low_rank_by(slot: Slot) -> str | None:
    """The adapter that brought the low-rank forward which all low-rank changes of this tensor compute with."""
    routes: _Routes = slot.owner.__dict__.get(_ROUTES, {})
    return next((adapter for parameter, adapter in routes if parameter == slot.parameter), None)


def _route_of(owner: nn.Module) -> _Route | None:
    return cast("_Route | None", type(owner).__dict__.get("_convlora_route"))


@functools.cache
def _adapted_class(base: type[nn.Module], parameters: tuple[str, ...], route: _Route | None) -> type:
    namespace: dict[str, Any] = {name: _weight_property(name) for name in parameters}
    namespace |= {"_convlora_base": base, "__reduce_ex__": _reduce, "__module__": base.__module__}
    if route is not None:
        namespace |= {"forward": _low_rank_dispatch(base, *route), "_convlora_route": route}
    metaclass: Any = type(base)
    cls: type = metaclass(base.__name__, (base,), namespace)
    cls.__qualname__ = base.__qualname__
    return cls


def _weight_property(parameter: str) -> property:
    def weight(self: nn.Module) -> Tensor:
        w0 = cast(Tensor, self._parameters[parameter])
        return _effective(self, w0, [change for _, change in _changes(self, parameter) if change.enabled])

    return property(weight)


def _low_rank_dispatch(base: type[nn.Module], low_rank: LowRankForward, parameter: str) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        weight = _low_rank_weight(self, parameter)
        if weight is None:  # nothing low-rank is active: the module's own forward, with the property above
            return base.forward(self, *args, **kwargs)
        return low_rank(self, weight, *args, **kwargs)

    return forward


def _changes(owner: nn.Module, parameter: str) -> list[tuple[str, Change]]:
    container = owner._modules.get(CONTAINER)
    named = container._modules.get(parameter) if container is not None else None
    return [] if named is None else cast("list[tuple[str, Change]]", list(named._modules.items()))


def _effective(owner: nn.Module, w0: Tensor, changes: list[Change]) -> Tensor:
    """`w0 + Σ strength·ΔW`, summed in the changes' precision whatever autocast says, in w0's dtype."""
    if not changes:
        return w0
    if not w0.is_meta and torch.is_autocast_enabled(w0.device.type):
        with torch.autocast(w0.device.type, enabled=False):
            return _effective_exact(owner, w0, changes)
    return _effective_exact(owner, w0, changes)


def _effective_exact(owner: nn.Module, w0: Tensor, changes: list[Change]) -> Tensor:
    matrix = as_matrix(w0, owner)
    total = None
    for change in changes:
        delta = change.strength * change.delta(matrix)
        total = delta if total is None else total + delta
    assert total is not None
    if total.ndim > matrix.ndim:
        raise ConvloraError(
            f"a {type(owner).__name__} computes with its whole weight, of which there is one for all samples, not "
            f'{len(total)}: inject the adapter with path="low_rank" for a change per sample'
        )
    return (w0 + total.view(w0.shape)).to(w0.dtype)


def _low_rank_weight(owner: nn.Module, parameter: str) -> LowRankWeight | None:
    changes = [change for _, change in _changes(owner, parameter) if change.enabled]
    low_rank = [change for change in changes if isinstance(change, LowRankChange)]
    if not low_rank:
        return None
    w0 = cast(Tensor, owner._parameters[parameter])
    others = [change for change in changes if not isinstance(change, LowRankChange)]
    lefts, rights = [], []
    for change in low_rank:
        left, right = change.factors(as_matrix(w0, owner))
        lefts.append((change.strength * left).to(w0.dtype))
        rights.append(right.to(w0.dtype))
    if len(low_rank) == 1:
        return LowRankWeight(_effective(owner, w0, others), lefts[0], rights[0])
    return LowRankWeight(_effective(owner, w0, others), _beside(lefts, -1), _beside(rights, -2))


def _beside(factors: list[Tensor], dim: int) -> Tensor:
    """Concatenated along the rank; where some have a change per sample, the others are repeated."""
    samples = torch.broadcast_shapes(*(factor.shape[:-2] for factor in factors))
    return torch.cat([factor.expand(*samples, *factor.shape[-2:]) for factor in factors], dim)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    # The generated class cannot be found by name, so pickle (and deepcopy) the object as one of its own class,
    # in whatever way that class wants it, and give it the generated class again afterwards.
    cls = type(self)
    route = _route_of(self)
    self.__class__ = own_class(self)
    try:
        build, args, *rest = cast(tuple[Any, ...], self.__reduce_ex__(protocol))
    finally:
        self.__class__ = cls
    parameters = tuple(name for name, value in cls.__dict__.items() if isinstance(value, property))
    return (_rebuild, (build, args, parameters, route), *rest)


def _rebuild(build: Any, args: Any, parameters: tuple[str, ...], route: _Route | None) -> nn.Module:
    module: nn.Module = build(*args)
    module.__class__ = _adapted_class(cast(Any, type(module)), parameters, route)
    return module
