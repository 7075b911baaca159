"""What a report holds: plain data, filled in by whoever ran the models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convlora.errors import ConvloraError

Views = dict[str, Tensor]  # model name -> images (N, 3, R, R) in [-1, 1]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) of `count` values; one value has no deviation, NaN."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Tensor | Iterable[float]) -> Spread:
        numbers = values.detach().flatten().tolist() if isinstance(values, Tensor) else [float(x) for x in values]
        if not numbers:
            raise ConvloraError("a spread of no values: measure at least one")
        if not all(math.isfinite(x) for x in numbers):  # statistics would raise on inf − inf
            whole = torch.tensor(numbers, dtype=torch.float64)
            return cls(float(whole.mean()), math.nan, len(numbers))
        return cls(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan, len(numbers))


@dataclass
class Row:
    """One model's line of the table; None where a number does not apply."""

    name: str
    trainables: int | None
    file_bytes: int | None
    seconds: float | None
    metrics: dict[str, Spread]


@dataclass
class Report:
    """Everything on the page. Sections whose pictures or curves are empty are left out.

    `metric_notes` defines each metric and says "higher is better" or "lower is better", which decides the
    marked value. `turntable_yaw` is in radians, one per frame, and `interpolation_weights` one per picture.
    """

    title: str
    person: str
    notice: str
    command: str
    environment: dict[str, str]
    settings: dict[str, str]
    album: Tensor
    rows: list[Row]
    metric_notes: dict[str, str]
    heldout_names: list[str] = field(default_factory=list)
    heldout_truth: Tensor = field(default_factory=lambda: torch.empty(0, 3, 1, 1))
    heldout: Views = field(default_factory=dict)
    turntable: Views = field(default_factory=dict)
    turntable_yaw: list[float] = field(default_factory=list)
    interpolation: Views = field(default_factory=dict)
    interpolation_weights: list[float] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # model -> (step, loss)
    moved_degrees: dict[str, list[float]] = field(default_factory=dict)  # which photos -> how far each camera moved

    def __post_init__(self) -> None:
        _check("album", self.album, len(self.album))
        _check("heldout_truth", self.heldout_truth, len(self.heldout_names))
        for section, views, count in (
            ("heldout", self.heldout, len(self.heldout_names)),
            ("turntable", self.turntable, len(self.turntable_yaw)),
            ("interpolation", self.interpolation, len(self.interpolation_weights)),
        ):
            for model, images in views.items():
                _check(f"{section}[{model!r}]", images, count)
        if any(abs(yaw) > 2 * math.pi + 1e-6 for yaw in self.turntable_yaw):
            raise ConvloraError(
                f"turntable_yaw is in radians, within a full turn; got {max(self.turntable_yaw, key=abs)}"
            )

    def models(self) -> list[str]:
        """Model names in the order they first appear: their colours on the page follow it."""
        views = (self.heldout, self.turntable, self.interpolation, self.curves)
        return list(dict.fromkeys([row.name for row in self.rows] + [name for part in views for name in part]))


def _check(what: str, images: Tensor, count: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != count:
        raise ConvloraError(
            f"{what} must be ({count}, 3, R, R), one picture per name or value; got {tuple(images.shape)}"
        )
