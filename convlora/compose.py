"""Several adapters of one model become one.

What is added up are the ΔW themselves, each at its weight and its own strength, and never their factors: the product
of summed factors has cross terms that no adapter was trained with.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from convlora import lowrank
from convlora.adapter import Adapter
from convlora.attach import base_modules, base_parameters
from convlora.errors import ConvloraError, RankError, TargetError
from convlora.fingerprint import fingerprint
from convlora.inject import build, check_name, install
from convlora.layers import Slot, as_matrix
from convlora.lowrank import Factors, Update
from convlora.methods import Change, Full, LoRA
from convlora.methods.para import PaRa
from convlora.record import Record

Weights: TypeAlias = "Mapping[str, float | Mapping[str, float]]"
How = Literal["sum", "concat", "svd", "ties", "dare", "para_union", "para_sequential", "null_space"]

# Directions closer than this are one direction of a union; see convlora.lowrank.union.
UNION_TOLERANCE = 1e-5


class Part(NamedTuple):
    """What one adapter brings to one tensor."""

    adapter: str
    weight: float  # as asked, without the change's own strength
    change: Change


class Composed(NamedTuple):
    """The result on one layer: its update, or PaRa's directions and how much of them is taken away."""

    update: Update
    strength: float = 1.0
    error: float = 0.0  # ‖ΔW − result‖, where ΔW was truncated
    size: float = 0.0  # ‖ΔW‖ there


#: One way of combining: (layer, its parts with the first adapter's first, W₀ as a matrix) -> the result.
Combine = Callable[[str, Sequence[Part], Tensor], Composed]


def compose(
    model: nn.Module,
    weights: Weights,
    how: How = "concat",
    name: str = "mix",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    against: Literal["rows", "columns", "both"] = "rows",
    soft: float | None = None,
) -> Adapter:
    """Make one adapter of several that are on `model`; the sources stay on it, disabled.

    A source that stayed enabled would count twice. `mix.remove()` does not enable them again:
    `Adapter.of(model, "id").enable()` does.

    Args:
        weights: `{adapter: weight}`; a weight is a number for every layer, or `{glob of layer or parameter names:
            number}`, first match wins, 0 where nothing matches. It multiplies the adapter's own strength. A layer that
            only one adapter has is taken with its weight, whatever `how`.
        how:
            "sum": Σ weight·ΔW, exact, stored as whole tensors (method "full").
            "concat": the same sum, exact, as a LoRA whose rank is the sum of the ranks, or the layer's limit where
            that is less. Changes without factors (DoRA, say) need the limit.
            "svd": the nearest LoRA of `rank` to that sum (at most: a layer whose sum has less keeps less).
            "ties": TIES-Merging, https://arxiv.org/abs/2306.01708: of each ΔW the `density` largest share of values,
            per value the sign that has the larger weighted sum, and the mean of the values with that sign.
            "dare": https://arxiv.org/abs/2311.03099: of each ΔW a random `density` share of values, scaled by
            1/density, then the sum. Both give whole tensors, or the nearest LoRA of `rank`.
            "para_union": of PaRa adapters, one that removes all their directions, (I − QQᵀ)W₀ with Q an orthonormal
            basis of all together; the order does not matter.
            "para_sequential": Π(I − λQQᵀ)W₀, the first adapter applied first, as an exact LoRA; only the last
            adapter's directions are gone for certain.
            "null_space": the first adapter as it is, the others projected off its row space, its column space or both
            (`against`), so that what it does to its own inputs (rows) or outputs (columns) stays untouched. After
            NP-LoRA, https://arxiv.org/abs/2511.11051. `soft=μ` keeps 1/(1 + μ) of the overlap; None keeps nothing.
        name: the new adapter's.
        density: 0 < density ≤ 1, for "ties" and "dare".
        seed: of "dare"; the same seed drops the same values on every device.

    Returns:
        The adapter. `options["composed"]` says what it was made of; where ΔW was truncated, `options["truncation"]`
        has ‖ΔW − result‖/‖ΔW‖ in `"layers"` and, over all layers together, in `"total"`.

    Raises:
        ConvloraError: an option that `how` has no use for, or lacks; a source is merged, or does not fit `how`; two
            sources have values for the same buffer (a running mean, say), which cannot be added.
        TargetError: no such adapter, a glob that matches nothing of it, or nothing left with a weight other than 0.
        RankError: `rank` is below 1, or a union would erase a layer.
    """
    check_name(model, name)
    sources = _sources(model, weights)
    first = next(iter(sources))
    combine = _combination(how, first, rank=rank, density=density, seed=seed, against=against, soft=soft)
    layers, trained = _parts(model, sources, weights)
    if how in ("para_union", "para_sequential"):
        _refuse_other_than_para(layers, how)
    buffers = _buffers(sources, weights)
    with torch.no_grad():
        results = {
            layer: combine(layer, parts, as_matrix(slot.tensor.detach(), slot.owner))
            for layer, (slot, parts) in layers.items()
        }
        values = {parameter: _weighted_value(slot, parts) for parameter, (slot, parts) in trained.items()}
    whole = how == "sum" or (how in ("ties", "dare") and rank is None)
    method = "full" if whole else "para" if how == "para_union" else "lora"
    options: dict[str, Any] = {"alpha": None, "rank_per": "matrix", "path": "auto"}
    options |= {"relative": False} if method == "lora" else {}
    options["composed"] = {"how": how, "of": _plain(weights)}
    if rank is not None:
        options["truncation"] = _truncation(results)
    ranks = {layer: _rank(result.update, whole) for layer, result in results.items()}
    strengths = {layer: result.strength for layer, result in results.items() if result.strength != 1}
    record = Record(
        name, method, {layer: (r, r) for layer, r in ranks.items()}, options, list(values), list(buffers),
        fingerprint(model), strengths, _metadata(list(sources.values())),
    )  # fmt: skip
    changes, full = build(model, record)
    with torch.no_grad():
        for layer, change in changes.items():
            slot, _ = layers[layer]
            _fill(change, results[layer].update, as_matrix(slot.tensor.detach(), slot.owner))
        for parameter, value in values.items():
            full[parameter].value.copy_(value)
    # From here on nothing can be refused: first the sources off, so that the new adapter finds the base's buffers.
    for source in sources.values():
        source.disable()
    return install(model, record, changes, full, buffers)


# --------------------------------------------------------------------------------------- who brings what


def _sources(model: nn.Module, weights: Weights) -> dict[str, Adapter]:
    if not isinstance(weights, Mapping) or not weights:
        raise ConvloraError(f'compose needs weights such as {{"id": 1.0, "style": 0.8}}, not {weights!r}')
    sources = {source: Adapter.of(model, source) for source in weights}
    for source, adapter in sources.items():
        if adapter.merged:
            raise ConvloraError(f"adapter {source!r} is merged: unmerge() it before composing")
        asked = weights[source]
        numbers = asked.values() if isinstance(asked, Mapping) else [asked]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ConvloraError(f"the weight of adapter {source!r} must be a finite number, not {number!r}")
        if isinstance(asked, Mapping):
            names = [*adapter.layers, *adapter.trained, *adapter.record.buffers]
            for glob in asked:
                if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                    raise TargetError(f"compose: {glob!r} matches nothing of adapter {source!r}: {', '.join(names)}")
    return sources


def _weight(asked: float | Mapping[str, float], name: str) -> float:
    if isinstance(asked, Mapping):
        return next((float(w) for glob, w in asked.items() if fnmatch.fnmatchcase(name, glob)), 0.0)
    return float(asked)


_Parts: TypeAlias = "dict[str, tuple[Slot, list[Part]]]"


def _parts(model: nn.Module, sources: Mapping[str, Adapter], weights: Weights) -> tuple[_Parts, _Parts]:
    """What the adapters bring, by layer and by name of the parameters trained in full, in model order.

    A tensor that is one adapter's layer and that another trains in full is a layer.
    """
    brought: dict[Slot, list[Part]] = {}
    layer_of: dict[Slot, str] = {}
    parameter_of: dict[Slot, str] = {}
    for source, adapter in sources.items():
        named: list[tuple[str, Slot, Change]] = []
        for layer, change in adapter.layers.items():
            slot = adapter.record.slot(model, layer)
            layer_of[slot] = layer
            named.append((layer, slot, change))
        for parameter, full in adapter.trained.items():
            slot = adapter.record.parameter_slot(model, parameter)
            parameter_of[slot] = parameter
            named.append((parameter, slot, full))
        for name, slot, change in named:
            weight = _weight(weights[source], name)
            if weight and float(change.strength):
                brought.setdefault(slot, []).append(Part(source, weight, change))
    if not brought:
        raise TargetError("compose: every adapter has weight or strength 0 on every layer; nothing would be left")
    layers = {layer_of[slot]: (slot, parts) for slot, parts in brought.items() if slot in layer_of}
    trained = {parameter_of[slot]: (slot, parts) for slot, parts in brought.items() if slot not in layer_of}
    modules = {name: place for place, (name, _) in enumerate(base_modules(model))}
    parameters = {name: place for place, (name, _) in enumerate(base_parameters(model))}
    return (
        dict(sorted(layers.items(), key=lambda item: modules[item[0]])),
        dict(sorted(trained.items(), key=lambda item: parameters[item[0]])),
    )


def _buffers(sources: Mapping[str, Adapter], weights: Weights) -> dict[str, Tensor]:
    """Copies of the buffers that an adapter with a weight holds values for."""
    owner: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for source, adapter in sources.items():
        state = adapter.state_dict()
        for buffer in adapter.record.buffers:
            if not _weight(weights[source], buffer):
                continue
            if buffer in owner:
                raise ConvloraError(
                    f"adapters {owner[buffer]!r} and {source!r} both have values for the buffer {buffer!r}, and "
                    "running statistics cannot be added: give one of them weight 0 there, such as "
                    f"{{{source!r}: {{{buffer!r}: 0, '*': 1}}}}"
                )
            owner[buffer] = source
            tensors[buffer] = state[f"train/{buffer}"].clone()
    return tensors


def _refuse_other_than_para(layers: _Parts, how: str) -> None:
    for layer, (_, parts) in layers.items():
        for part in parts:
            if not isinstance(part.change, PaRa):
                kind = type(part.change).__name__
                raise ConvloraError(
                    f"how={how!r} combines PaRa adapters only, and adapter {part.adapter!r} has a {kind} on layer "
                    f'{layer!r}; how="concat" adds the changes of any methods'
                )


def _weighted(part: Part, w0: Tensor) -> Update:
    return lowrank.scaled(lowrank.update_of(part.change, w0), part.weight)


def _weighted_value(slot: Slot, parts: Sequence[Part]) -> Tensor:
    """A tensor trained in full: the base's and the weighted sum of the differences from it."""
    base = slot.tensor.detach()
    deltas = [lowrank.dense(_weighted(part, as_matrix(base))) for part in parts]
    return base + torch.stack(deltas).sum(0).view_as(base)


# ------------------------------------------------------------------------------------------ the ways to combine


def _combination(how: str, first: str, **options: Any) -> Combine:
    """The way to combine, with its options checked."""
    uses = {
        "sum": (), "concat": (), "svd": ("rank",), "ties": ("density", "rank"), "dare": ("density", "rank", "seed"),
        "para_union": (), "para_sequential": (), "null_space": ("against", "soft"),
    }  # fmt: skip
    if how not in uses:
        raise ConvloraError(f"how must be one of {', '.join(uses)}, not {how!r}")
    defaults = {"rank": None, "density": None, "seed": 0, "against": "rows", "soft": None}
    for option, value in options.items():
        if option not in uses[how] and value != defaults[option]:
            raise ConvloraError(f"how={how!r} has no use for {option}={value!r}")
    rank, density, seed = options["rank"], options["density"], options["seed"]
    against, soft = options["against"], options["soft"]
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RankError(f"rank must be a whole number from 1 on, not {rank!r}")
    if how == "svd" and rank is None:
        raise RankError('how="svd" needs the rank to truncate to: rank=8, say')
    if how in ("ties", "dare") and (not isinstance(density, int | float) or not 0 < density <= 1):
        raise ConvloraError(
            f"how={how!r} needs density, the share of values it keeps, 0 < density ≤ 1, not {density!r}"
        )
    if against not in ("rows", "columns", "both"):
        raise ConvloraError(f'against must be "rows", "columns" or "both", not {against!r}')
    if soft is not None and not soft >= 0:
        raise ConvloraError(f"soft is a μ from 0 (no projection) on, or None for a hard one, not {soft!r}")
    if how in ("sum", "svd"):
        return lambda layer, parts, w0: _truncate(lowrank.total([_weighted(p, w0) for p in parts]), rank)
    if how == "concat":
        return lambda layer, parts, w0: Composed(
            lowrank.as_factors(lowrank.total([_weighted(part, w0) for part in parts]))
        )
    if how == "ties":
        return lambda layer, parts, w0: _truncate(_ties([_weighted(p, w0) for p in parts], density), rank)
    if how == "dare":
        # On the CPU, so that a seed means the same values on every device.
        generator = torch.Generator().manual_seed(seed)
        return lambda layer, parts, w0: _truncate(_dare([_weighted(p, w0) for p in parts], density, generator), rank)
    if how == "null_space":
        kept = 0.0 if soft is None else 1 / (1 + soft)
        return lambda layer, parts, w0: _null_space(parts, w0, first, against, kept)
    return _para_union if how == "para_union" else _para_sequential


def _truncate(update: Update, rank: int | None) -> Composed:
    if rank is None:
        return Composed(update)
    decomposition = lowrank.svd(update)
    factors, error = lowrank.truncated(decomposition, min(rank, max(1, lowrank.numerical_rank(decomposition))))
    return Composed(factors, error=error, size=float(decomposition.S.norm()))


def _ties(updates: Sequence[Update], density: float) -> Update:
    if len(updates) == 1:
        return updates[0]
    trimmed = torch.stack([_trimmed(lowrank.dense(update), density) for update in updates])
    sign = trimmed.sum(0).sign()
    agrees = trimmed.sign() == sign
    return (trimmed * agrees).sum(0) / (agrees & (trimmed != 0)).sum(0).clamp_min(1)


def _trimmed(delta: Tensor, density: float) -> Tensor:
    size = delta.abs().flatten()
    keep = math.ceil(density * len(size))
    smallest = size.kthvalue(len(size) - keep + 1).values
    return torch.where(delta.abs() >= smallest, delta, 0)


def _dare(updates: Sequence[Update], density: float, generator: torch.Generator) -> Update:
    if len(updates) == 1:
        return updates[0]
    kept = []
    for update in updates:
        delta = lowrank.dense(update)
        mask = torch.rand(delta.shape, generator=generator) < density
        kept.append(torch.where(mask.to(delta.device), delta / density, 0))
    return torch.stack(kept).sum(0)


def _null_space(parts: Sequence[Part], w0: Tensor, first: str, against: str, kept: float) -> Composed:
    updates = {part.adapter: _weighted(part, w0) for part in parts}
    if first not in updates or len(updates) == 1:
        return Composed(lowrank.as_factors(lowrank.total(list(updates.values()))))
    principal = updates.pop(first)
    rows = lowrank.row_space(principal) if against in ("rows", "both") else None
    columns = lowrank.column_space(principal) if against in ("columns", "both") else None
    projected: list[Update] = []
    for update in updates.values():
        left, right = lowrank.as_factors(update)
        if rows is not None:
            right = right - (1 - kept) * (right @ rows) @ rows.mT
        if columns is not None:
            left = left - (1 - kept) * columns @ (columns.mT @ left)
        projected.append(Factors(left, right))
    return Composed(lowrank.as_factors(lowrank.total([principal, *projected])))


def _directions(part: Part, w0: Tensor) -> tuple[Tensor, float]:
    """PaRa's Q `(out, r)` and the λ of its I − λQQᵀ, weight included."""
    change = cast(PaRa, part.change)
    left, _ = change.factors(w0)
    return -left, part.weight * float(change.strength) * float(change.warmth)


def _para_union(layer: str, parts: Sequence[Part], w0: Tensor) -> Composed:
    found = [_directions(part, w0) for part in parts]
    amounts = [amount for _, amount in found]
    if any(abs(amount - amounts[0]) > 1e-6 for amount in amounts):
        raise ConvloraError(
            f'how="para_union": on layer {layer!r} the adapters take away different shares of their directions '
            f"(weight · strength · warm-up: {', '.join(f'{a:g}' for a in amounts)}), and a union has one; give them "
            'equal weights, or use how="para_sequential" or "concat"'
        )
    Q = lowrank.union([Q for Q, _ in found], UNION_TOLERANCE)
    if Q.shape[1] >= len(Q):
        raise RankError(
            f'how="para_union": together the adapters remove all {len(Q)} output directions of layer {layer!r}, which '
            "would erase it; give one of them weight 0 there"
        )
    return Composed(Factors(Q, Q.mT @ w0.to(Q.dtype)), strength=amounts[0])


def _para_sequential(layer: str, parts: Sequence[Part], w0: Tensor) -> Composed:
    w0 = w0.to(lowrank.factor_dtype(w0))
    left, right = w0.new_zeros(len(w0), 0), w0.new_zeros(0, w0.shape[1])
    for part in parts:
        Q, amount = _directions(part, w0)
        seen = Q.mT @ w0 + (Q.mT @ left) @ right  # Qᵀ times the weight as the adapters before left it
        left, right = torch.cat([left, -amount * Q], 1), torch.cat([right, seen])
    return Composed(lowrank.as_factors(lowrank.total([Factors(left, right)])))


# ------------------------------------------------------------------------------------------ writing it down


def _fill(change: Change, update: Update, w0: Tensor) -> None:
    """Give a freshly built change the tensors that make its ΔW the update."""
    if isinstance(change, Full):
        change.value.copy_((w0 + lowrank.dense(update)).view_as(change.value))
        return
    left, right = lowrank.as_factors(update)
    cast(Any, change).B.copy_(left)
    if isinstance(change, LoRA):
        change.A.copy_(right)


def _rank(update: Update, whole: bool) -> int:
    return min(update.shape) if whole or not isinstance(update, Factors) else update.rank


def _truncation(results: Mapping[str, Composed]) -> dict[str, Any]:
    """Relative errors, for the options."""
    layers = {layer: result.error / result.size if result.size else 0.0 for layer, result in results.items()}
    error, size = (math.hypot(*(getattr(r, key) for r in results.values())) for key in ("error", "size"))
    return {"total": error / size if size else 0.0, "layers": layers}


def _metadata(sources: Sequence[Adapter]) -> dict[str, str]:
    """The text fields in which all sources agree. Whose faces are in it stays known; a consent for one does not."""
    first, *others = [source.record.metadata for source in sources]
    agreed = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    persons = dict.fromkeys(
        source.record.metadata["person"] for source in sources if "person" in source.record.metadata
    )
    if persons and agreed.get("person") is None:
        agreed["person"] = ", ".join(persons)
    if len(persons) > 1:
        agreed.pop("consent", None)
    return agreed


def _plain(weights: Weights) -> dict[str, Any]:
    return {source: dict(asked) if isinstance(asked, Mapping) else asked for source, asked in weights.items()}
