"""Diversity and identity scores against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.metrics import diversity, id_sim, identity_consistency
from convlora.integrations.eg3d.metrics.identity import subset
from convlora.integrations.eg3d.metrics.loading import PerceptualDistance

#: the distance of mean colours: a perceptual network whose numbers can be worked out by hand
COLOUR = PerceptualDistance(
    "colour", lambda x: [x.mean((2, 3))], lambda a, b: (a[0] - b[0]).abs().mean(1), (), ()
)  # fmt: skip


def grey(*levels: float) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def test_distances_within_clusters_by_hand() -> None:
    found = diversity(grey(0.0, 0.1, 0.2, 0.95, 1.05), grey(0.1, 1.0, 5.0), COLOUR)
    first, second = (0.1 + 0.1 + 0.2) / 3, 0.1
    assert found.mean == pytest.approx((first + second) / 2)
    assert found.std == pytest.approx(abs(first - second) / 2, rel=1e-4)
    weights = [-p * math.log10(p) for p in (0.6, 0.4)]
    assert found.balanced == pytest.approx((weights[0] * first + weights[1] * second) / sum(weights))
    assert (found.clusters, found.empty) == (2, 1)


def test_at_most_so_many_of_a_cluster_are_compared_and_a_seed_repeats() -> None:
    images = grey(*torch.linspace(0, 1, 40).tolist())
    few = diversity(images, grey(0.5), COLOUR, keep=5, seed=3)
    assert few == diversity(images, grey(0.5), COLOUR, keep=5, seed=3) != diversity(images, grey(0.5), COLOUR)


def test_no_cluster_of_two_has_no_diversity() -> None:
    found = diversity(grey(0.0, 1.0), grey(0.0, 1.0), COLOUR)
    assert math.isnan(found.mean) and (found.clusters, found.empty) == (0, 2)
    with pytest.raises(ConvloraError, match="0 and 1"):
        diversity(grey(0.0)[:0], grey(0.0), COLOUR)


def test_images_are_reduced_to_the_side_asked_for() -> None:
    seen = []
    spy = PerceptualDistance("spy", lambda x: seen.append(x.shape[-1]) or [x.mean((2, 3))], COLOUR.distance, (), ())
    diversity(grey(0.0, 0.1), grey(0.0), spy, side=4)
    assert set(seen) == {4}


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_mean_of_the_largest_cosines_and_references_of_a_fixed_size() -> None:
    generated, reference = unit(5, 8), unit(12, 8)
    by_hand = torch.stack([row.sort(descending=True).values[:3].mean() for row in generated @ reference.T])
    assert torch.allclose(id_sim(generated, reference, top=3), by_hand)
    few = subset(reference, 4, seed=1)
    assert torch.equal(few, subset(reference, 4, seed=1)) and len(few.unique(dim=0)) == 4
    assert bool((id_sim(generated, few) <= id_sim(generated, reference)).all())
    for wrong in (lambda: id_sim(generated, reference, 13), lambda: subset(reference, 13)):
        with pytest.raises(ConvloraError, match="1[23]"):
            wrong()


def test_consistency_of_views() -> None:
    same = unit(3, 1, 8).expand(-1, 4, -1)
    assert torch.allclose(identity_consistency(same), torch.ones(3), atol=1e-6)
    views = unit(2, 3, 8)
    by_hand = torch.stack([(v[0] @ v[1] + v[0] @ v[2] + v[1] @ v[2]) / 3 for v in views])
    assert torch.allclose(identity_consistency(views), by_hand, atol=1e-6)
    with pytest.raises(ConvloraError, match="views"):
        identity_consistency(unit(2, 1, 8))
