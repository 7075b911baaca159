"""The personal space: coefficients that keep their promises for every θ, and projections on the nearest points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.tasks.hull import Hull, make_hull, project_to_simplex

settings.register_profile("hull", deadline=None, max_examples=40)
settings.load_profile("hull")


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


hulls = st.builds(
    lambda seed, n, width, dilation: make_hull(draw(seed, n, width), dilation),
    st.integers(0, 999), st.integers(1, 60), st.integers(1, 32), st.floats(1.0, 8.0),
)  # fmt: skip


@given(hulls, st.integers(0, 999), st.floats(0, 300))
def test_every_theta_gives_feasible_coefficients(hull: Hull, seed: int, scale: float) -> None:
    alpha = hull.coefficients(scale * draw(seed, 5, len(hull.anchors)))
    assert torch.allclose(alpha.sum(-1), torch.ones(5, dtype=alpha.dtype), atol=1e-9)
    assert float(alpha.min()) >= -hull.beta - 1e-12


@given(hulls, st.integers(0, 999))
def test_the_dilation_identity(hull: Hull, seed: int) -> None:
    # w = mean + κ·(a point of the convex hull − mean): MyStyle's P_β is a dilation, not a band around the hull.
    theta = draw(seed, 3, len(hull.anchors))
    mean = hull.anchors.mean(0)
    inside = theta.softmax(-1) @ hull.anchors
    assert torch.allclose(hull.w(hull.coefficients(theta)), mean + hull.dilation * (inside - mean), atol=1e-8)


@given(hulls, st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_no_theta_however_large_breaks_the_promises(hull: Hull, data: st.DataObject, dtype: torch.dtype) -> None:
    count = len(hull.anchors)
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    theta = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count)), dtype=dtype)
    alpha = hull._replace(anchors=hull.anchors.to(dtype)).coefficients(theta)
    assert bool(alpha.isfinite().all())
    assert float(alpha.sum()) == pytest.approx(1, abs=1e-5 if dtype == torch.float32 else 1e-12)
    assert float(alpha.min()) >= -hull.beta - 1e-6


@given(hulls)
def test_corners_of_the_dilated_hull_are_the_anchors_moved_away_from_their_mean(hull: Hull) -> None:
    count, mean = len(hull.anchors), hull.anchors.mean(0)
    corners = hull.coefficients(1e4 * torch.eye(count, dtype=mean.dtype))
    torch.testing.assert_close(hull.w(corners), mean + hull.dilation * (hull.anchors - mean))
    assert hull.dilation == pytest.approx(1 + count * hull.beta)
    assert make_hull(hull.anchors, beta=hull.beta).dilation == pytest.approx(hull.dilation)


@pytest.mark.parametrize("parametrisation", ["exact", "mystyle"])
def test_both_parametrisations_start_at_the_mean_anchor(parametrisation) -> None:
    hull = make_hull(draw(0, 50, 16), beta=0.02)
    alpha = hull.coefficients(hull.start((2,), parametrisation), parametrisation)
    assert hull.dilation == pytest.approx(2) and alpha.shape == (2, 50)
    assert torch.allclose(hull.w(alpha), hull.anchors.mean(0).expand(2, -1), atol=1e-6)


def test_the_soft_parametrisation_breaks_the_bound_that_the_exact_one_keeps() -> None:
    hull = make_hull(draw(0, 3, 4), beta=0.03)
    theta = torch.tensor([0.05, -0.04, -0.04], dtype=torch.float64)
    assert float(hull.coefficients(theta, "mystyle").min()) < -hull.beta
    assert float(hull.coefficients(theta).min()) >= -hull.beta


@given(hulls, st.integers(0, 999))
def test_no_feasible_point_is_nearer_than_the_projection(hull: Hull, seed: int) -> None:
    w = 3 * draw(seed, 2, hull.anchors.shape[1])
    alpha = hull.project(w, steps=2000)
    assert bool(hull.contains(alpha, 1e-7).all())
    distance = (hull.w(alpha) - w).norm(dim=-1)
    others = hull.coefficients(3 * draw(seed + 1, 200, 1, len(hull.anchors)))
    assert bool((distance <= (hull.w(others) - w).norm(dim=-1) + 1e-3).all())
    # the optimality condition: no anchor of the dilated hull lies further in the direction of w
    corners = hull.w(hull.dilation * torch.eye(len(hull.anchors), dtype=w.dtype) - hull.beta)
    gap = torch.einsum("bd,bnd->bn", w - hull.w(alpha), corners - hull.w(alpha)[:, None]).amax(-1)
    assert bool((gap <= 1e-2 * (1 + distance**2)).all())


@given(hulls, st.integers(0, 999))
def test_points_inside_are_their_own_projection(hull: Hull, seed: int) -> None:
    w = hull.w(hull.coefficients(draw(seed, 2, len(hull.anchors))))
    assert torch.allclose(hull.w(hull.project(w, steps=3000)), w, atol=2e-2)


@given(hulls, st.integers(0, 999))
def test_the_nearest_coefficients_are_feasible_and_keep_feasible_ones(hull: Hull, seed: int) -> None:
    alpha = hull.coefficients(draw(seed, 2, len(hull.anchors)))
    assert torch.allclose(hull.nearest(alpha), alpha, atol=1e-9)
    assert bool(hull.contains(hull.nearest(alpha + 5 * draw(seed + 1, 2, len(hull.anchors))), 1e-9).all())


@given(hulls, st.integers(0, 999), st.floats(0.1, 30))
def test_the_nearest_coefficients_are_their_own_nearest(hull: Hull, seed: int, scale: float) -> None:
    alpha = hull.nearest(scale * draw(seed, 3, len(hull.anchors)))
    torch.testing.assert_close(hull.nearest(alpha), alpha, rtol=0, atol=1e-9)
    assert torch.allclose(alpha.sum(-1), torch.ones(3, dtype=alpha.dtype), atol=1e-9)


@settings(max_examples=10)
@given(hulls, st.integers(0, 999), st.floats(0.1, 30))
def test_projected_latents_are_their_own_projection(hull: Hull, seed: int, scale: float) -> None:
    w = hull.w(hull.project(scale * draw(seed, 3, hull.anchors.shape[1]), steps=1000))
    again = hull.w(hull.project(w, steps=1000))
    assert float((again - w).norm(dim=-1).max()) < 1e-2 * (1 + float(w.norm(dim=-1).max()))


@given(st.integers(0, 999), st.integers(1, 20))
def test_the_simplex_projection_is_the_nearest_point(seed: int, n: int) -> None:
    x = 3 * draw(seed, n)
    s = project_to_simplex(x)
    assert float(s.min()) >= 0 and float(s.sum()) == pytest.approx(1)
    others = draw(seed + 1, 300, n).softmax(-1)
    assert float((s - x).norm()) <= float((others - x).norm(dim=-1).min()) + 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dilation=0.5), "0.5"), (dict(beta=-0.1), "dilation is"), (dict(dilation=2, beta=0.1), "not both"),
        (dict(dilation=float("nan")), "nan"),
    ],
)  # fmt: skip
def test_impossible_hulls_are_refused(arguments, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        make_hull(draw(0, 4, 3), **arguments)
