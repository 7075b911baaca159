"""Operators that spoil photos."""

from __future__ import annotations

import pytest
import torch

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.tasks.degrade import center_hole, downsample, free_form_hole


@pytest.mark.parametrize("how", ["area", "bicubic", "blur"])
def test_downsampling_keeps_flat_pictures_and_lets_gradients_through(how) -> None:
    images = torch.full((2, 3, 64, 64), 0.3, requires_grad=True)
    small = downsample(images, 16, how)
    assert small.shape == (2, 3, 4, 4) and torch.allclose(small, torch.tensor(0.3), atol=1e-5)
    small.sum().backward()
    assert float(images.grad.sum()) == pytest.approx(2 * 3 * 16, rel=1e-3)


def test_area_is_the_mean_of_each_cell() -> None:
    images = torch.randn(1, 3, 8, 8)
    assert torch.allclose(downsample(images, 4)[0, 1, 0, 1], images[0, 1, :4, 4:].mean())


@pytest.mark.parametrize(("factor", "how", "message"), [(3, "area", "64"), (0, "area", "0"), (4, "magic", "magic")])
def test_impossible_downsampling(factor, how, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        downsample(torch.zeros(1, 3, 64, 64), factor, how)


def test_holes() -> None:
    hole = center_hole(64, 0.5)
    assert hole.shape == (1, 1, 64, 64) and float(1 - hole.mean()) == pytest.approx(0.25)
    assert torch.equal(hole, hole.flip(-1)) and torch.equal(hole, hole.flip(-2))
    free = free_form_hole(64, seed=1)
    assert torch.equal(free, free_form_hole(64, seed=1)) and not torch.equal(free, free_form_hole(64, seed=2))
    assert 0.5 < float(free.mean()) < 0.97 and set(free.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ConvloraError, match="share=1.5"):
        center_hole(64, 1.5)
