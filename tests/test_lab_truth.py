"""The drawn world's own truth about depth and attributes."""

from __future__ import annotations

import pytest
import torch

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.lab import people, truth, world


@pytest.fixture(scope="module")
def moments():
    person = people.evaluation_people(1)[0]
    shot = people.photos(person, "test", 2, 64)
    return shot, cameras.random_views(3, seed=1)


def test_true_views_are_the_photos_from_their_own_cameras(moments) -> None:
    shot, labels = moments
    for i in range(2):
        own = truth.true_views(shot.params[i : i + 1], shot.traits[i : i + 1], shot.labels[i : i + 1], 64, 32)
        assert torch.equal(own.images[0, 0], shot.images[i])
    found = truth.true_views(shot.params, shot.traits, labels, 64, 32)
    assert found.images.shape == (2, 3, 3, 64, 64) and found.depths.shape == found.masks.shape == (2, 3, 1, 32, 32)


def test_depth_errors_are_those_put_in_and_only_the_head_counts(moments) -> None:
    shot, labels = moments
    found = truth.true_views(shot.params, shot.traits, labels, 64, 32)
    assert torch.equal(truth.depth_error(found.depths, found), torch.zeros(2, 3))
    wrong = found.depths + 0.05 + 10 * (found.masks == 0)
    assert torch.allclose(truth.depth_error(wrong, found), torch.full((2, 3), 0.05), atol=1e-5)
    with pytest.raises(ConvloraError, match="head in every view"):
        truth.depth_error(found.depths, found._replace(masks=torch.zeros_like(found.masks)))


@pytest.mark.parametrize(("name", "amount"), [("smile", 1.0), ("age", 1.5)])
def test_an_attribute_drawn_with_a_change_is_measured_as_that(moments, name, amount) -> None:
    shot, _ = moments
    moved = shot.params.clone()
    moved[:, world.PARAM_NAMES.index(name)] += amount
    poses, _ = cameras.split_label(shot.labels)
    after = world.render(moved, shot.traits, poses, None, 64).image
    given = shot.params, shot.traits, shot.labels, name
    found = truth.attribute_change(shot.images, after, *given)
    assert torch.allclose(found.amount, torch.full((2,), amount)) and (found.share > 0.999).all()
    # other light changes the whole face: hardly any of that is the attribute
    lit = shot.params.clone()
    lit[:, world.PARAM_NAMES.index("light_x")] += 1.5
    other = truth.attribute_change(shot.images, world.render(lit, shot.traits, poses, None, 64).image, *given)
    assert (other.share < 0.5).all()
    nothing = truth.attribute_change(shot.images, shot.images, *given)
    assert torch.equal(nothing.amount, torch.zeros(2))
    with pytest.raises(ConvloraError, match="no attribute 'joy'"):
        truth.attribute_change(shot.images, shot.images, *given[:3], "joy")
