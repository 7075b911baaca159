"""What a report holds: plain data, filled in by whoever ran the models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from convlora.errors import ConvloraError

Views = dict[str, Tensor]  # model name -> images (N, 3, R, R) in [-1, 1]
LONGEST = 60  # positions of a slider: at 256 pixels each they are as wide as a WebP can be


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


class Axis(NamedTuple):
    """A slider: what it moves, the label of each position, where it starts.

    `drag` says which way it goes when a finger on the picture moves right (or down, for a second axis): 1 up, -1 down.
    """

    name: str
    labels: list[str]
    start: int = 0
    drag: int = 1


@dataclass(frozen=True)
class Stage:
    """Pictures of every model, among which one or two sliders choose: a section of the page.

    `views` are (K, 3, R, R) for each model, K the product of the axes' lengths, the first axis the fastest. Originals
    `photos`, (caption, (3, R, R)), stand beside them; with `stops`, positions on the first axis, each stands for its
    own and leads there. `plays` offers to go through the first axis by itself.
    """

    name: str  # of the section in the page, a word
    title: str
    lead: str
    axes: tuple[Axis, ...]
    views: Views
    photos: list[tuple[str, Tensor]] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    plays: bool = False

    def __post_init__(self) -> None:
        if len(self.axes) not in (1, 2):
            raise ConvloraError(f"stage {self.name!r} has {len(self.axes)} sliders; one or two choose a picture")
        for axis in self.axes:
            if not 1 <= len(axis.labels) <= LONGEST or not 0 <= axis.start < len(axis.labels):
                raise ConvloraError(
                    f"slider {axis.name!r} has {len(axis.labels)} positions and starts at {axis.start}; from 1 to "
                    f"{LONGEST} positions are possible, and it starts at one of them"
                )
        for model, images in self.views.items():
            _check(f"{self.name}[{model!r}]", images, math.prod(len(axis.labels) for axis in self.axes))
        if self.stops and (len(self.stops) != len(self.photos) or max(self.stops) >= len(self.axes[0].labels)):
            raise ConvloraError(
                f"stage {self.name!r} has {len(self.photos)} photos and stops at {self.stops}; each photo needs one, "
                f"below {len(self.axes[0].labels)}"
            )

    def first_row(self) -> Views:
        """The pictures along the first axis, the second where it starts."""
        count = len(self.axes[0].labels)
        skipped = count * (self.axes[1].start if len(self.axes) == 2 else 0)
        return {model: images[skipped : skipped + count] for model, images in self.views.items()}


@dataclass
class Report:
    """Everything on the page. Sections whose pictures or curves are empty are left out.

    `metric_notes` defines each metric and says "higher is better" or "lower is better", which decides the
    marked value.
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
    stages: list[Stage] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # model -> (step, loss)
    moved_degrees: dict[str, list[float]] = field(default_factory=dict)  # which photos -> how far each camera moved

    def __post_init__(self) -> None:
        _check("album", self.album, len(self.album))
        _check("heldout_truth", self.heldout_truth, len(self.heldout_names))
        for model, images in self.heldout.items():
            _check(f"heldout[{model!r}]", images, len(self.heldout_names))
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConvloraError(f"two stages have one name: {', '.join(names)}")

    def models(self) -> list[str]:
        """Model names in the order they first appear: their colours on the page follow it."""
        names = [row.name for row in self.rows] + list(self.heldout)
        names += [name for stage in self.stages for name in stage.views] + list(self.curves)
        return list(dict.fromkeys(names))


def _check(what: str, images: Tensor, count: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != count:
        raise ConvloraError(
            f"{what} must be ({count}, 3, R, R), one picture per name or value; got {tuple(images.shape)}"
        )
