"""Which of its two ways an adapted layer computes in, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

from torch import nn

from convlora.adapter import Adapter
from convlora.attach import low_rank_by
from convlora.errors import ConvloraError
from convlora.layers import LowRankForward, low_rank_forward
from convlora.methods import Change, LowRankChange

Path = Literal["auto", "weight", "low_rank"]

# Measured by benchmarks/step.py on layers of 32 to 512 channels and ranks of 1 to 64: up to a quarter of the channels
# on the narrower side, the low-rank path is the faster one.
_CHANNELS_PER_RANK = 4


class LayerPath(NamedTuple):
    """One row of `convlora.explain`."""

    layer: str
    adapter: str
    path: Literal["low_rank", "weight", "merged"]
    reason: str


def forward_for(
    model: nn.Module, layer: str, change: Change, inner: int, shape: tuple[int, ...], path: Path
) -> LowRankForward | None:
    """The low-rank forward that this layer is to compute with, or None for the full effective weight."""
    forward, reason = _choose(model.get_submodule(layer), change, inner, shape, path)
    if path == "low_rank" and forward is None:
        raise ConvloraError(f'path="low_rank": layer {layer!r}: {reason}; use "auto"')
    return forward


def explain(model: nn.Module) -> list[LayerPath]:
    """Print, and return, how each adapted layer computes and why: one row per layer and adapter.

    On the "low_rank" path, no convolution makes a gradient of the weight's size; "weight" forms `W₀ + ΔW` and
    differentiates through it; a "merged" layer is a plain one. Raises `ConvloraError` if the model has no adapter.
    """
    rows = []
    for name in Adapter.names(model):
        adapter = Adapter.of(model, name)
        for layer, change in adapter.layers.items():
            if adapter.merged:
                rows.append(LayerPath(layer, name, "merged", "its weight is W₀ + ΔW"))
                continue
            inner, slot = adapter.record.ranks[layer][1], adapter.record.slot(model, layer)
            path = cast(Path, adapter.options["path"])
            forward, reason = _choose(model.get_submodule(layer), change, inner, slot.shape, path)
            by = low_rank_by(slot)
            if forward is None and by is not None and isinstance(change, LowRankChange):
                forward, reason = low_rank_forward(slot.owner), f"the layer is on the low-rank path of adapter {by!r}"
            rows.append(LayerPath(layer, name, "weight" if forward is None else "low_rank", reason))
    if not rows:
        raise ConvloraError(f"{type(model).__name__} has no adapted layer; convlora.inject_lora puts an adapter on it")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print(*(text.ljust(width) for text, width in zip(row, widths)), row.reason, sep="  ")
    return rows


def _choose(
    module: nn.Module, change: Change, inner: int, shape: tuple[int, ...], path: Path
) -> tuple[LowRankForward | None, str]:
    forward = low_rank_forward(module)
    channels = min(shape[:2])
    if path == "weight":
        return None, 'path="weight" was asked for'
    if not isinstance(change, LowRankChange):
        return None, f"ΔW of {type(change).__name__} is no product of factors"
    if forward is None:
        return None, f"{type(module).__name__} has no low-rank forward (see convlora.register_layer)"
    if path == "low_rank":
        return forward, 'path="low_rank" was asked for'
    if _CHANNELS_PER_RANK * inner > channels:
        return None, f"rank {inner} is more than a quarter of {channels} channels"
    return forward, f"rank {inner} of {channels} channels"
