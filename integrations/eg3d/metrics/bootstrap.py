"""Confidence intervals of means, by resampling people before photos: photos of one person are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from convlora.errors import ConvloraError


class Interval(NamedTuple):
    """A mean, the bounds of its confidence interval, and how many people and values it rests on."""

    mean: float
    low: float
    high: float
    people: int
    values: int

    def __str__(self) -> str:
        digits = 3 if max(map(abs, self[:3])) >= 0.02 else 5
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def bootstrap(groups: Sequence[ArrayLike], level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """The mean over people of the mean over each one's values, with a percentile bootstrap interval.

    `groups` holds one sequence of values per person. People are drawn with replacement, then the values within each;
    with one person, only the values. Every person counts alike, however many values there are.

    Raises:
        ConvloraError: no people, a person without values, a value that is not finite, or a level outside (0, 1).
    """
    people = [np.asarray(group, dtype=float).ravel() for group in groups]
    if not people or not all(len(values) for values in people):
        raise ConvloraError(f"an interval needs at least one value of every person, got {[len(v) for v in people]}")
    if not all(np.isfinite(values).all() for values in people):
        raise ConvloraError("an interval needs finite values; some are NaN or infinite")
    if not 0 < level < 1 or draws < 1:
        raise ConvloraError(f"level={level} must lie between 0 and 1, and draws={draws} be at least 1")
    random = np.random.default_rng(seed)
    # mean of each person's resampled values, for every draw: (people, draws)
    means = np.stack([values[random.integers(len(values), size=(draws, len(values)))].mean(1) for values in people])
    if len(people) > 1:
        chosen = random.integers(len(people), size=(len(people), draws))
        means = np.take_along_axis(means, chosen, 0)
    low, high = np.quantile(means.mean(0), [(1 - level) / 2, (1 + level) / 2])
    mean = float(np.mean([values.mean() for values in people]))
    return Interval(mean, float(low), float(high), len(people), sum(map(len, people)))


def paired_difference(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], level: float = 0.95, draws: int = 4000, seed: int = 0
) -> Interval:
    """`bootstrap` of first − second, value by value: both measured on the same photos of the same people."""
    shapes = [[np.size(g) for g in groups] for groups in (first, second)]
    if shapes[0] != shapes[1]:
        raise ConvloraError(f"paired values must be of the same photos; their numbers are {shapes[0]} and {shapes[1]}")
    return bootstrap([np.subtract(a, b) for a, b in zip(first, second)], level, draws, seed)
