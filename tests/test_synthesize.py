"""Novel appearances of a person."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_generator

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.tasks import novel_views
from convlora.integrations.eg3d.tasks.hull import make_hull
from convlora.integrations.eg3d.tasks.synthesize import sample_alpha, synthesize


@given(
    st.integers(1, 30), st.integers(1, 5), st.floats(1, 5), st.floats(0, 1), st.integers(0, 99),
    st.sampled_from(["normalized_uniform", "dirichlet"]),
)  # fmt: skip
def test_samples_lie_in_the_personal_space(n, support, dilation, truncation, seed, weights) -> None:
    hull = make_hull(torch.randn(n, 4), dilation)
    alpha = sample_alpha(hull, 20, support=min(support, n), weights=weights, truncation=truncation, seed=seed)
    assert alpha.shape == (20, n) and bool(hull.contains(alpha, 1e-4).all())


def angles(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """True yaw and elevation (N,) in radians of cameras labels (N, 25), from where they stand."""
    x, y, z = cameras.split_label(labels.double())[0][:, :3, 3].T
    return torch.atan2(x, z), torch.atan2(y, (x.square() + z.square()).sqrt())


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.integers(0, 999))
def test_novel_views_reach_the_true_angles_and_no_further(yaw: float, pitch: float, seed: int) -> None:
    # EG3D's vertical parameter is a share of the sphere's area: sin(elevation) = 2·pitch/π
    highest = math.asin(2 * pitch / math.pi)
    turned, raised = angles(cameras.random_views(400, yaw, pitch, seed=seed))
    assert float(turned.abs().max()) <= yaw + 1e-5 and float(turned.abs().max()) > 0.95 * yaw
    assert float(raised.abs().max()) <= highest + 1e-5 and float(raised.abs().max()) > 0.95 * highest
    turned, raised = angles(cameras.random_views(4, yaw, pitch, "orbit"))  # at 0, 90, 180 and 270 degrees
    assert turned.tolist() == pytest.approx([0, yaw, 0, -yaw], abs=1e-5)
    assert raised.tolist() == pytest.approx([-highest, 0, highest, 0], abs=1e-5)


def test_the_papers_pitch_is_nine_degrees() -> None:
    _, raised = angles(cameras.random_views(4, mode="orbit"))  # yaw ±0.35, pitch ±0.25, as My3DGen says
    assert float(raised.max()) == pytest.approx(0.1598, abs=5e-5)
    assert math.degrees(float(raised.max())) == pytest.approx(9.16, abs=5e-3)
    assert cameras.vertical_angle(0.1598) == pytest.approx(math.pi / 2 - 0.25, abs=1e-4)


def test_the_two_ways_to_draw_weights_have_the_known_largest_weight() -> None:
    hull = make_hull(torch.randn(50, 4), 1.0)
    for weights, known in (("normalized_uniform", 0.523), ("dirichlet", 0.611)):
        largest = sample_alpha(hull, 20000, weights=weights).amax(1)
        assert float(largest.mean()) == pytest.approx(known, abs=0.01)
    spread = sample_alpha(hull, 5000, support=50, weights="dirichlet").amax(1).mean()
    assert float(spread) == pytest.approx(0.09, abs=0.01)


def test_no_truncation_and_full_truncation() -> None:
    hull = make_hull(torch.randn(5, 4))
    mean = sample_alpha(hull, 3, truncation=0.0)
    assert torch.allclose(mean, torch.full((3, 5), 0.2))


def test_pictures_are_those_of_the_latents_returned_and_a_folder_resumes(tmp_path) -> None:
    G = tiny_generator()
    hull = make_hull(torch.randn(6, 8), 1.0)
    found = synthesize(G, hull, 5, batch_size=2)
    assert found.images.shape == (5, 3, G.img_resolution, G.img_resolution)
    again = novel_views(G, found.w[3:4], found.labels[3:4])[0]
    assert torch.allclose(again, found.images[3:4], atol=1e-4)
    synthesize(G, hull, 5, batch_size=2, out=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"{i:04d}.png" for i in range(5)]
    files[4].unlink()
    times = [f.stat().st_mtime_ns for f in files[:4]]
    synthesize(G, hull, 5, batch_size=2, out=tmp_path)
    assert files[4].is_file() and [f.stat().st_mtime_ns for f in files[:4]] == times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(support=7), "6 anchors"), (dict(count=0), "count=0"), (dict(weights="even"), "even"),
        (dict(labels=torch.zeros(3, 25)), "5, 25"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused(arguments, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        synthesize(tiny_generator(), make_hull(torch.randn(6, 8)), **{"count": 5, **arguments})
