"""Novel appearances of a person."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_generator

from convlora.errors import ConvloraError
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
