"""Which layers and tensors of a model are meant: patterns to names, names to slots, ranks to layers."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from torch import nn

from convlora.attach import base_modules, base_parameters
from convlora.errors import RankError, TargetError
from convlora.layers import Slot, as_matrix, find_slot, kernel_side, low_rank_forward

Pattern: TypeAlias = "str | re.Pattern[str] | Callable[[str, nn.Module], bool]"
Patterns: TypeAlias = "Pattern | Iterable[Pattern]"


class AdaptableLayer(NamedTuple):
    """One row of `adaptable(model)`."""

    name: str
    kind: str  #: class name of the module
    shape: tuple[int, ...]  #: shape of the raw weight
    matrix: tuple[int, int]  #: (out, cols) of its matrix view
    low_rank_path: bool  #: whether the layer can compute without the full effective weight

    @property
    def max_rank(self) -> int:
        return min(self.matrix)

    def __str__(self) -> str:
        path = "" if self.low_rank_path else "  (weight path only)"
        return f"{self.name or '(the model itself)'}: {self.kind} {list(self.shape)}, rank up to {self.max_rank}{path}"


def adaptable(
    model: nn.Module, targets: Patterns | None = None, exclude: Patterns | None = None
) -> list[AdaptableLayer]:
    """The layers that `inject_lora` with the same `targets` and `exclude` would adapt; changes nothing.

    Raises `TargetError` if a pattern of `targets` matches no adaptable layer.
    """
    rows = []
    for name, slot in select_layers(model, targets, exclude).items():
        module, weight = model.get_submodule(name), slot.tensor
        out, cols = as_matrix(weight, slot.owner).shape
        low_rank = low_rank_forward(module) is not None
        rows.append(AdaptableLayer(name, type(module).__name__, tuple(weight.shape), (out, cols), low_rank))
    return rows


def select_layers(model: nn.Module, targets: Patterns | None, exclude: Patterns | None) -> dict[str, Slot]:
    """`{module name: slot}` in model order."""
    slots = {name: (module, slot) for name, module in base_modules(model) if (slot := find_slot(module)) is not None}
    if not slots:
        raise TargetError(
            f"{type(model).__name__} has no layer that can be adapted: no module holds a floating-point `weight` "
            "with two or more dimensions. If yours keeps it under another name, see convlora.register_layer."
        )
    wanted = set(slots)
    if targets is not None:
        wanted = set()
        for pattern in _listed(targets):
            found = {name for name, (module, _) in slots.items() if _matches(pattern, name, module)}
            if not found:
                raise TargetError(_nothing_matched(pattern, model, list(slots)))
            wanted |= found
    if exclude is not None:
        patterns = _listed(exclude)
        wanted = {name for name in wanted if not any(_matches(p, name, slots[name][0]) for p in patterns)}
        if not wanted:
            raise TargetError(
                f"exclude={_shown(exclude)} leaves none of the layers that targets={_shown(targets)} matches"
            )
    return {name: slot for name, (_, slot) in slots.items() if name in wanted}


def select_parameters(model: nn.Module, patterns: Patterns) -> dict[str, Slot]:
    """`{parameter name: slot}` for `train=`: patterns on parameter names, or on modules for all that is in them."""
    parameters: dict[str, Slot] = {}
    modules = dict(base_modules(model))
    owners = {name: name.rpartition(".")[0] for name, _ in base_parameters(model)}
    for pattern in _listed(patterns):
        inside = [name for name, module in modules.items() if _matches(pattern, name, module)]
        prefixes = tuple(name + "." if name else "" for name in inside)
        found = [name for name in owners if name.startswith(prefixes) or _matches(pattern, name, modules[owners[name]])]
        if not found:
            raise TargetError(f"train={_shown(pattern)} matches no parameter and no module with parameters")
        for name in found:
            owner = modules[owners[name]]
            if isinstance(owner, nn.RNNBase):
                raise TargetError(
                    f"train={_shown(pattern)}: {name} belongs to a {type(owner).__name__}, whose kernels read their "
                    "weights past Python; set requires_grad on it yourself instead"
                )
            parameters[name] = Slot(owner, name.rpartition(".")[2])
    return parameters


def select_buffers(model: nn.Module, patterns: Patterns) -> list[str]:
    """Names of the saved buffers in modules that `train=` names (a BatchNorm's running statistics, say)."""
    names = []
    for name, module in base_modules(model):
        parents = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
        if any(_matches(p, parent, module) for p in _listed(patterns) for parent in parents):
            persistent = [b for b in module._buffers if b not in module._non_persistent_buffers_set]
            names += [f"{name}.{b}" if name else b for b in persistent if module._buffers[b] is not None]
    return names


def resolve_ranks(
    slots: Mapping[str, Slot],
    rank: int | None,
    ranks: Mapping[str, int] | None,
    rank_per: str,
    limits: Mapping[str, int],
) -> dict[str, tuple[int, int]]:
    """`{module name: (nominal rank, inner size)}` without the layers of rank 0; the first glob that matches wins.

    `rank=None` is each layer's limit.
    """
    if rank_per not in ("matrix", "kernel"):
        raise RankError(f'rank_per must be "matrix" or "kernel", not {rank_per!r}')
    ranks = dict(ranks or {})
    for glob in ranks:
        if not any(fnmatch.fnmatchcase(name, glob) for name in slots):
            raise TargetError(
                f"ranks: {glob!r} matches none of the {len(slots)} selected layers: {_listing(list(slots))}"
            )
    resolved = {}
    for name, slot in slots.items():
        nominal = next((r for glob, r in ranks.items() if fnmatch.fnmatchcase(name, glob)), None)
        from_ranks = nominal is not None
        if nominal is None:
            nominal = limits[name] if rank is None else rank
        if isinstance(nominal, bool) or not isinstance(nominal, int):
            raise RankError(f"layer {name!r}: the rank must be a whole number, not {nominal!r}")
        if nominal == 0 and from_ranks:
            continue
        if nominal < 1:
            raise RankError(f"layer {name!r}: rank {nominal} is below 1 (ranks={{glob: 0}} skips a layer)")
        if rank_per == "matrix" and nominal > limits[name]:
            out, cols = as_matrix(slot.tensor, slot.owner).shape
            raise RankError(
                f"layer {name!r}: rank {nominal} is above {limits[name]}, the most its {out} × {cols} matrix can "
                f"have; lower rank=, or give this layer its own with ranks={{{name!r}: {limits[name]}}}"
            )
        # My3DGen's code counts rank per kernel row and lets it exceed small layers; "kernel" reproduces that.
        resolved[name] = (nominal, nominal * (kernel_side(slot.shape) if rank_per == "kernel" else 1))
    return resolved


def _listed(patterns: Patterns) -> list[Pattern]:
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        return [patterns]
    if isinstance(patterns, Iterable):
        return list(patterns)
    raise TargetError(
        f"patterns are a glob, a compiled regular expression, a callable, or a list of these, not {patterns!r}"
    )


def _matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if callable(pattern):
        return bool(pattern(name, module))
    raise TargetError(
        f"a pattern is a glob, a compiled regular expression or a callable (name, module), not {pattern!r}"
    )


def _nothing_matched(pattern: Pattern, model: nn.Module, names: list[str]) -> str:
    message = f"targets={_shown(pattern)} matches no adaptable layer of {type(model).__name__}."
    if isinstance(pattern, str):
        others = [name for name, _ in base_modules(model) if fnmatch.fnmatchcase(name, pattern)]
        inside = [name for name in names if any(name.startswith(other + ".") for other in others)]
        if others and inside:
            message += f" It matches {_listing(others)}, which holds adaptable layers: try {pattern + '.*'!r}."
        elif others:
            message += f" It matches {_listing(others)}, which has no weight matrix."
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
        if near:
            message += f" Close to it: {_listing(near)}."
    return f"{message} Adaptable layers ({len(names)}): {_listing(names, 20)}"


def _listing(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names) - most} more)" if len(names) > most else "")


def _shown(patterns: object) -> str:
    return repr(patterns.pattern) if isinstance(patterns, re.Pattern) else repr(patterns)
