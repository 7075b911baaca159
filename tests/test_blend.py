"""Joining generated pictures and photos: what each way keeps, and that seams vanish where they should."""

from __future__ import annotations

import pytest
import torch

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.tasks.blend import blend, gaussian_blur

R = 64


def pictures(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a, b = (gaussian_blur(torch.randn(2, 3, R, R, generator=draw), 3.0) for _ in range(2))
    known = torch.ones(1, 1, R, R)
    known[..., 20:44, 16:48] = 0
    return a, b, known


@pytest.mark.parametrize("how", ["paste", "feather", "laplacian", "poisson"])
def test_equal_pictures_blend_to_themselves(how) -> None:
    a, _, known = pictures()
    assert torch.allclose(blend(a, a, known, how), a, atol=1e-4)


@pytest.mark.parametrize("how", ["paste", "feather", "laplacian", "poisson"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_masks_without_a_seam_give_one_of_the_two(how, value) -> None:
    a, b, known = pictures()
    found = blend(a, b, torch.full_like(known, value), how)
    assert torch.allclose(found, b if value else a, atol=1e-5)


@pytest.mark.parametrize("how", ["paste", "feather", "poisson"])
def test_the_photo_stays_itself_away_from_the_seam(how) -> None:
    a, b, known = pictures()
    found = blend(a, b, known, how, width=4)
    assert torch.equal(found[..., :8, :], b[..., :8, :])
    if how != "poisson":
        assert torch.equal(found[..., 20:44, 16:48], a[..., 20:44, 16:48])


def test_poisson_keeps_the_gradients_of_the_generator_and_meets_the_photo() -> None:
    a, _, known = pictures()
    shifted = a + torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    # The generated picture differs by a constant colour: with the photo at the seam, nothing of it remains.
    assert torch.allclose(blend(shifted, a, known, "poisson"), a, atol=1e-4)


def test_a_hole_at_the_border_of_the_picture_is_solved_too() -> None:
    a, _, known = pictures()
    known[..., :30, :] = 0
    assert torch.allclose(blend(a + 0.5, a, known, "poisson", width=2), a, atol=1e-4)


def test_soft_seams_are_smoother_than_a_paste() -> None:
    a, _, known = pictures()
    dark, bright = torch.full_like(a, -0.5), torch.full_like(a, 0.5)

    def steepest(how) -> float:
        return float(blend(dark, bright, known, how).diff(dim=-1).abs().max())

    assert steepest("paste") == pytest.approx(1.0)
    assert steepest("feather") < 0.3
    assert steepest("laplacian") < 0.6
    assert steepest("poisson") < 0.05


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, R, R - 1), "64, 63|1, 64, 63"), (torch.ones(3, 1, R, R), "(3, 1, 64, 64)"),
        (torch.full((1, 1, R, R), 255.0), "255"), (torch.ones(1, 3, R, R), r"\(1, 3"),
    ],
)  # fmt: skip
def test_wrong_masks_are_named(mask, message) -> None:
    a, b, _ = pictures()
    with pytest.raises(ConvloraError, match=message):
        blend(a, b, mask)


def test_an_unknown_way_lists_the_known_ones() -> None:
    a, b, known = pictures()
    with pytest.raises(ConvloraError, match="paste, feather, laplacian, poisson"):
        blend(a, b, known, "magic")  # type: ignore[arg-type]
