"""Confidence intervals: they cover what they promise, and count people, not photos."""

from __future__ import annotations

import numpy as np
import pytest

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.metrics.bootstrap import bootstrap, paired_difference


def test_intervals_cover_the_true_mean_about_as_often_as_promised() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        groups = [random.normal(random.normal(0, 1), 1, size=5) for _ in range(20)]
        found = bootstrap(groups, level=0.9, draws=400, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 0.82 <= covered / 200 <= 0.97


def test_many_photos_of_few_people_do_not_make_a_narrow_interval() -> None:
    people = [np.full(1000, mean) for mean in (0.0, 1.0, 2.0)]
    found = bootstrap(people)
    assert found.mean == 1 and found.high - found.low > 1 and (found.people, found.values) == (3, 3000)


def test_one_person_is_resampled_photo_by_photo_and_seeds_repeat() -> None:
    values = np.random.default_rng(1).normal(5, 1, 50)
    found = bootstrap([values])
    assert found == bootstrap([values]) and found.low < values.mean() < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.2)


def test_paired_differences_cancel_what_two_models_share() -> None:
    random = np.random.default_rng(2)
    shared = [random.normal(0, 10, 8) for _ in range(6)]
    better = [s + 0.5 + random.normal(0, 0.1, 8) for s in shared]
    found = paired_difference(better, shared)
    assert 0.4 < found.low < found.mean < found.high < 0.6


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], []], [[float("nan")]]])
def test_nothing_to_average_is_refused(groups) -> None:
    with pytest.raises(ConvloraError, match="value"):
        bootstrap(groups)


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ConvloraError, match=r"\[2\] and \[3\]"):
        paired_difference([[1, 2]], [[1, 2, 3]])
