"""How much adapters change their model, and how far two of them are at odds: from the factors, per layer and block.

Everything is measured in effective units: a raw weight times the module's `weight_gain` where it has one (equalised
learning rates), which is what the layer computes with. Within one layer that makes no difference to a ratio, across
the layers of a block it does. Sums are taken in float64.
"""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from convlora import lowrank
from convlora.adapter import Adapter
from convlora.attach import find_change, frozen
from convlora.errors import ConvloraError
from convlora.files import replacing
from convlora.layers import as_matrix
from convlora.load import load_adapter
from convlora.lowrank import Factors, Update

By = Literal["layer", "block"]
UNITS = "effective: raw weight times the module's weight_gain where it has one"


def block_of(layer: str) -> str:
    """The block a layer belongs to: its path up to the first component with a digit, or else its parent's.

    >>> [block_of(layer) for layer in ("backbone.synthesis.b8.conv0.affine", "layers.3.conv", "mapping.embed", "head")]
    ['backbone.synthesis.b8', 'layers.3', 'mapping', '']
    """
    parts = layer.split(".")
    depth = next((place + 1 for place, part in enumerate(parts) if re.search(r"\d", part)), len(parts) - 1)
    return ".".join(parts[:depth])


# ------------------------------------------------------------------------------------------------ weight change


class WeightChange(NamedTuple):
    """One layer or block; where several adapters were measured, the mean over them and the standard deviation."""

    name: str
    ratio: float  #: ‖ΔW‖/‖W₀‖, Frobenius norms; over a block, of all its layers' weights together
    std: float | None  #: sample standard deviation of the ratio over the adapters; None for a single one
    mean_abs: float  #: mean|ΔW| / mean|W₀|
    mean_abs_std: float | None


class WeightChanges(list[WeightChange]):
    """The rows of `weight_change`, in model order."""

    def __init__(self, rows: Iterable[WeightChange], by: By, adapters: Sequence[str]) -> None:
        super().__init__(rows)
        self.by = by
        self.adapters = list(adapters)

    def table(self) -> str:
        """Plain text, one line per layer or block, in percent."""
        rows: list[tuple[str, ...]] = [(self.by, "‖ΔW‖/‖W₀‖", "mean|ΔW|/mean|W₀|")]
        for row in self:
            cells = (_percent(row.ratio, row.std), _percent(row.mean_abs, row.mean_abs_std))
            rows.append((row.name or "(top level)", *cells))
        over = f", mean ± standard deviation over {len(self.adapters)} adapters" if len(self.adapters) > 1 else ""
        return _table(rows) + f"\n{UNITS}{over}"

    def json(self) -> str:
        """`{"by", "adapters", "units", "rows": [{"name", "ratio", "std", "mean_abs", "mean_abs_std"}, …]}`."""
        rows = [row._asdict() for row in self]
        return json.dumps({"by": self.by, "adapters": self.adapters, "units": UNITS, "rows": rows}, indent=2)

    def plot(self, path: str | Path) -> Path:
        """Write a PNG with one bar per layer or block, error bars of one standard deviation.

        Raises `ConvloraError` if matplotlib is not installed: `pip install "convlora[plot]"`.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise ConvloraError('plot needs matplotlib: pip install "convlora[plot]"') from None
        figure = Figure(figsize=(7, 1.1 + 0.24 * len(self)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        names = [row.name or "(top level)" for row in self]
        spread = [100 * (row.std or 0) for row in self] if len(self.adapters) > 1 else None
        axes.barh(range(len(self)), [100 * row.ratio for row in self], xerr=spread, height=0.7, capsize=2)
        axes.set_yticks(range(len(self)), names, fontsize=8)
        axes.invert_yaxis()  # the model's first layer on top
        axes.set_ylim(len(self) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("‖ΔW‖ / ‖W₀‖ in %")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(self.adapters) > 1:
            axes.set_title(f"mean and standard deviation over {len(self.adapters)} adapters", fontsize=9)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        return Path(path)


class _Size(NamedTuple):
    """Sums over the values of one layer, in effective units."""

    change_squared: float
    weight_squared: float
    change_abs: float
    weight_abs: float


def weight_change(
    adapters: Adapter | str | Path | Iterable[Adapter | str | Path],
    by: By = "layer",
    *,
    model: nn.Module | None = None,
) -> WeightChanges:
    """How much adapters change each layer or block of their model (as figure 9 of My3DGen counts it).

    Norms come from the factors where a method has them, the means of absolute values from pieces of a few rows; a
    whole ΔW is never formed for a low-rank change. Each adapter counts at its present strength, enabled or not.
    Tensors trained in full (`train=`) are not layers and are left out.

    Args:
        adapters: one or several, on one model or on copies of it. A layer that only some of them change counts with
            0 for the others. Files, or Hub ids, need `model`, onto which each is loaded for the measurement.
        by: "layer", or "block": a layer's path up to the first component with a digit (`backbone.synthesis.b8`,
            `layers.3`), else its parent.

    Raises:
        ConvloraError: no adapters, a file without `model`, or `by` is something else.
        FileError: a file does not belong to `model`.
    """
    if by not in ("layer", "block"):
        raise ConvloraError(f'by must be "layer" or "block", not {by!r}')
    listed = [adapters] if isinstance(adapters, Adapter | str | Path) else list(adapters)
    if not listed:
        raise ConvloraError("weight_change needs at least one adapter")
    with torch.no_grad():
        measured = [_of_file(a, model) if isinstance(a, str | Path) else _sizes(a) for a in listed]
    layers = _in_order(measured)
    weights: dict[str, _Size] = {layer: sizes[layer] for sizes in reversed(measured) for layer in sizes}
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer if by == "layer" else block_of(layer), []).append(layer)
    rows = []
    for name, members in groups.items():
        each = [
            [sizes.get(m, weights[m]._replace(change_squared=0, change_abs=0)) for m in members] for sizes in measured
        ]
        sums = [_Size(*map(math.fsum, zip(*sizes))) for sizes in each]
        ratio = [math.sqrt(_share(s.change_squared, s.weight_squared)) for s in sums]
        mean_abs = [_share(s.change_abs, s.weight_abs) for s in sums]
        rows.append(WeightChange(name, *_mean_and_std(ratio), *_mean_and_std(mean_abs)))
    return WeightChanges(rows, by, [a.name if isinstance(a, Adapter) else str(a) for a in listed])


def _sizes(adapter: Adapter) -> dict[str, _Size]:
    sizes = {}
    for layer in adapter.record.ranks:
        update, gain, w0 = _update(adapter, layer)
        weight = lowrank.wide(w0)
        assert isinstance(weight, Tensor)
        absolute = math.fsum(float(piece.double().abs().sum()) for piece in lowrank.rows_of(update))
        sizes[layer] = _Size(
            (gain * lowrank.norm(update)) ** 2,
            gain**2 * float(weight.square().sum()),
            gain * absolute,
            gain * float(weight.abs().sum()),
        )
    return sizes


def _of_file(path: str | Path, model: nn.Module | None) -> dict[str, _Size]:
    if model is None:
        raise ConvloraError(f"{str(path)!r} holds changes only: pass the base model too, weight_change(…, model=model)")
    name = "measured"
    while name in Adapter.names(model):
        name += "_"
    adapter = load_adapter(model, path, name)
    try:
        return _sizes(adapter)
    finally:
        adapter.remove()


def _in_order(measured: Sequence[Mapping[str, _Size]]) -> list[str]:
    """All layers, each adapter's own order kept where the adapters share layers."""
    order: list[str] = []
    for sizes in sorted(measured, key=len, reverse=True):
        place = 0
        for layer in sizes:
            if layer in order:
                place = order.index(layer) + 1
            else:
                order.insert(place, layer)
                place += 1
    return order


def _mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _share(change: float, weight: float) -> float:
    """change/weight; a weight of zeros counts as changed by as much as there is, 1, or not at all."""
    return change / weight if weight else float(change > 0)


# ----------------------------------------------------------------------------------------------------- conflict


class LayerConflict(NamedTuple):
    """Two adapters on one layer. None: not defined, since a ΔW is zero or its method has no factors."""

    name: str
    cosine: float | None  #: ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖), −1 to 1
    ratio: float | None  #: ‖ΔW₁‖/‖ΔW₂‖
    column_angles: list[float] | None  #: principal angles of the column (output) spaces, degrees, smallest first
    row_angles: list[float] | None  #: principal angles of the row (input) spaces
    column_overlap: float | None  #: ‖Q₁ᵀQ₂‖²/min(r₁, r₂), 0 to 1; for PaRa the share of directions both remove
    row_overlap: float | None
    sign_disagreement: float | None  #: share of the values that both change which they change in opposite directions


class BlockConflict(NamedTuple):
    """Two adapters on all layers of a block, or of the model, together; a layer that only one has counts with 0."""

    name: str
    cosine: float | None
    ratio: float | None
    sign_disagreement: float | None


class Conflict(NamedTuple):
    """What `conflict` found."""

    a: str  #: name of the first adapter
    b: str
    total: BlockConflict
    blocks: list[BlockConflict]
    layers: list[LayerConflict]  #: those that both adapters change
    only_a: list[str]  #: layers that only the first one changes
    only_b: list[str]

    def table(self) -> str:
        """Plain text: every layer that both have, the blocks, the total."""
        head = ("", "cosine", "ratio", "columns: overlap", "smallest angle", "rows: overlap", "smallest angle", "signs")
        rows = [head]
        for layer in self.layers:
            columns = (_number(layer.column_overlap), _degrees(layer.column_angles))
            rows_ = (_number(layer.row_overlap), _degrees(layer.row_angles))
            signs = _number(layer.sign_disagreement)
            rows.append((layer.name, _number(layer.cosine), _number(layer.ratio), *columns, *rows_, signs))
        for block in [*self.blocks, self.total]:
            name = "total" if block is self.total else f"block {block.name or '(top level)'}"
            signs = _number(block.sign_disagreement)
            rows.append((name, _number(block.cosine), _number(block.ratio), "", "", "", "", signs))
        lines = [f"{self.a!r} and {self.b!r}; ratio is ‖ΔW {self.a}‖/‖ΔW {self.b}‖", _table(rows)]
        for name, only in ((self.a, self.only_a), (self.b, self.only_b)):
            lines += [f"only {name!r} changes {', '.join(only)}"] if only else []
        return "\n".join(lines)

    def json(self) -> str:
        """All of it, by the names of the fields."""
        content = self._asdict() | {
            "units": UNITS,
            "total": self.total._asdict(),
            "blocks": [block._asdict() for block in self.blocks],
            "layers": [layer._asdict() for layer in self.layers],
        }
        return json.dumps(content, indent=2)


class _Sums(NamedTuple):
    """What adds up over layers, in effective units."""

    inner: float = 0.0
    a_squared: float = 0.0
    b_squared: float = 0.0
    opposite: int = 0
    both: int = 0

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.inner + other.inner,
            self.a_squared + other.a_squared,
            self.b_squared + other.b_squared,
            self.opposite + other.opposite,
            self.both + other.both,
        )

    def conflict(self, name: str, signs: bool) -> BlockConflict:
        size = math.sqrt(self.a_squared * self.b_squared)
        cosine = min(1.0, max(-1.0, self.inner / size)) if size else None
        ratio = math.sqrt(self.a_squared / self.b_squared) if self.b_squared else None
        return BlockConflict(name, cosine, ratio, self.opposite / self.both if signs and self.both else None)


@torch.no_grad()
def conflict(a: Adapter, b: Adapter, *, signs: bool = False) -> Conflict:
    """How two adapters of one model would disturb each other, at their present strengths.

    The cosine is that of the two updates as vectors: from the factors, tr((B₂ᵀB₁)(A₁A₂ᵀ)) over the norms, without
    forming a ΔW. Near 0 they do not interfere on average, near 1 they do the same twice, near −1 they undo each other.
    Principal angles and overlaps tell whether they write to the same outputs (columns) and read from the same inputs
    (rows), whatever the cosine; they are given where both methods have factors.

    Args:
        signs: also count the values that the two change in opposite directions, which takes every ΔW, piece by piece.

    Raises:
        ConvloraError: a layer of the same name has another shape in the other adapter's model.
    """
    layers, sums = [], dict[str, _Sums]()
    for layer in dict.fromkeys([*a.record.ranks, *b.record.ranks]):
        if layer not in b.record.ranks:
            sums[layer] = _Sums(a_squared=_squared(a, layer))
        elif layer not in a.record.ranks:
            sums[layer] = _Sums(b_squared=_squared(b, layer))
        else:
            found, sums[layer] = _layer_conflict(a, b, layer, signs)
            layers.append(found)
    blocks: dict[str, _Sums] = {}
    for layer, own in sums.items():
        blocks[block_of(layer)] = blocks.get(block_of(layer), _Sums()).plus(own)
    total = functools.reduce(_Sums.plus, sums.values(), _Sums())
    return Conflict(
        a.name,
        b.name,
        total.conflict("total", signs),
        [block.conflict(name, signs) for name, block in blocks.items()],
        layers,
        [layer for layer in a.record.ranks if layer not in b.record.ranks],
        [layer for layer in b.record.ranks if layer not in a.record.ranks],
    )


def _layer_conflict(a: Adapter, b: Adapter, layer: str, signs: bool) -> tuple[LayerConflict, _Sums]:
    (one, gain_a, _), (two, gain_b, _) = _update(a, layer), _update(b, layer)
    if one.shape != two.shape:
        raise ConvloraError(
            f"layer {layer!r} is {_times(one)} under adapter {a.name!r} and {_times(two)} under {b.name!r}: the "
            "adapters belong to different models"
        )
    inner = gain_a * gain_b * lowrank.inner(one, two)
    sums = _Sums(inner, (gain_a * lowrank.norm(one)) ** 2, (gain_b * lowrank.norm(two)) ** 2)
    if signs:
        pieces = [x.sign() * y.sign() for x, y in zip(lowrank.rows_of(one), lowrank.rows_of(two))]
        sums = sums._replace(
            opposite=sum(int((p < 0).sum()) for p in pieces), both=sum(int(p.count_nonzero()) for p in pieces)
        )
    angles: dict[str, list[float] | None] = {"column": None, "row": None}
    overlaps: dict[str, float | None] = {"column": None, "row": None}
    if isinstance(one, Factors) and isinstance(two, Factors):
        one, two = lowrank.wide(one), lowrank.wide(two)
        for which, space in (("column", lowrank.column_space), ("row", lowrank.row_space)):
            cosines = lowrank.principal_cosines(space(one), space(two))
            if len(cosines):
                angles[which] = [math.degrees(angle) for angle in cosines.arccos().tolist()]
                overlaps[which] = float(cosines.square().mean())
    both = sums.conflict(layer, signs)
    found = LayerConflict(
        layer, both.cosine, both.ratio, angles["column"], angles["row"], overlaps["column"], overlaps["row"],
        both.sign_disagreement,
    )  # fmt: skip
    return found, sums


def _squared(adapter: Adapter, layer: str) -> float:
    update, gain, _ = _update(adapter, layer)
    return (gain * lowrank.norm(update)) ** 2


# ------------------------------------------------------------------------------------------------------ shared


def _update(adapter: Adapter, layer: str) -> tuple[Update, float, Tensor]:
    """ΔW of a layer, the gain that makes it effective, and W₀ as a matrix."""
    slot = adapter.record.slot(adapter.model, layer)
    change = find_change(slot, adapter.name)
    if change is None:
        raise ConvloraError(f"the change of adapter {adapter.name!r} on {layer!r} was taken off by other code")
    w0 = as_matrix(frozen(slot, adapter.name), slot.owner)
    gain = getattr(adapter.model.get_submodule(layer), "weight_gain", 1.0)
    return lowrank.update_of(change, w0), abs(float(gain)), w0


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def _percent(value: float, std: float | None) -> str:
    return f"{value:.2%}" if std is None else f"{value:.2%} ± {std:.2%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _degrees(angles: Sequence[float] | None) -> str:
    return f"{angles[0]:.1f}°" if angles else ""


def _times(update: Update) -> str:
    return " × ".join(map(str, update.shape))
