"""Attribute directions and edits that stay in the personal space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_generator
from torch import Tensor

from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.tasks import novel_views
from convlora.integrations.eg3d.tasks.directions import Direction, find_direction, without
from convlora.integrations.eg3d.tasks.edit import edit, edit_alpha, personal_direction
from convlora.integrations.eg3d.tasks.hull import Hull, make_hull


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scored(noise: float = 0.1, offset: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    truth = torch.nn.functional.normalize(draw(1, 32), dim=0)
    w = draw(0, 3000, 32) + offset
    return w, (w @ truth) + noise * draw(2, 3000), truth


@pytest.mark.parametrize("fit", ["svm", "logistic"])
def test_a_planted_direction_is_found(fit) -> None:
    w, scores, truth = scored()
    found = find_direction(w, scores, "smile", share=0.1, fit=fit)
    assert float(found.normal @ truth) > 0.95  # upwards, not only parallel
    assert float(found.normal.norm()) == pytest.approx(1, abs=1e-5)
    assert found.accuracy > 0.97 and found.accuracy_rest > 0.8


def test_scores_that_mean_nothing_are_measured_as_chance() -> None:
    found = find_direction(draw(0, 4000, 8), draw(3, 4000), "noise", share=0.1)
    assert 0.35 < found.accuracy < 0.65


def test_the_fit_does_not_depend_on_the_scale_of_the_latents() -> None:
    w, scores, _ = scored()
    a, b = (find_direction(w * scale, scores, "smile", share=0.1).normal for scale in (1.0, 100.0))
    assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scores=torch.ones(3000)), "all 3000 scores of 'smile' are 1"),
        (dict(scores=torch.full((3000,), float("nan"))), "3000 of 3000 scores"),
        (dict(scores=torch.ones(7)), "7"),
        (dict(share=0.7), "share=0.7"),
        (dict(share=0.0005), "1 a side"),
        (dict(fit="forest"), "forest"),
    ],
)
def test_unusable_scores_are_refused(change, message) -> None:
    w, scores, _ = scored()
    arguments = {"scores": scores, "share": 0.1, **change}
    with pytest.raises(ConvloraError, match=message):
        find_direction(w, arguments.pop("scores"), "smile", **arguments)


def test_directions_survive_their_file(tmp_path) -> None:
    w, scores, _ = scored()
    found = find_direction(w, scores, "smile", share=0.1)
    again = Direction.load(found.save(tmp_path / "smile.safetensors"))
    assert torch.equal(again.normal, found.normal) and again[1:] == found[1:]
    make = torch.zeros(1)
    from convlora import files

    with pytest.raises(FileError, match="no direction"):
        Direction.load(files.write(tmp_path / "other.safetensors", {"x": make}, {}))


def test_a_conditional_direction_leaves_the_others_alone() -> None:
    a, b, c = draw(1, 16), draw(2, 16), draw(3, 16)
    found = without(a, b, c)
    assert float((found @ b).abs()) < 1e-5 and float((found @ c).abs()) < 1e-5
    assert float(found.norm()) == pytest.approx(1, abs=1e-6) and float(found @ a) > 0
    with pytest.raises(ConvloraError, match="span"):
        without(b - 2 * c, b, c)


hulls = st.builds(
    lambda seed, n, width, dilation: make_hull(10 + draw(seed, n, width), dilation),
    st.integers(0, 999), st.integers(2, 40), st.integers(2, 24), st.floats(1.0, 6.0),
)  # fmt: skip


@given(hulls, st.integers(0, 999), st.sampled_from(["stop", "continue", "project"]))
def test_an_edit_keeps_the_sum_of_the_coefficients(hull: Hull, seed: int, exit) -> None:
    direction = personal_direction(hull, draw(seed, hull.anchors.shape[1]))
    alpha = hull.coefficients(draw(seed + 1, 3, len(hull.anchors)))
    edited = edit_alpha(hull, alpha, direction, torch.linspace(-2, 2, 5), exit=exit)
    assert edited.shape == (5, 3, len(hull.anchors))
    assert torch.allclose(edited.sum(-1), torch.ones(5, 3), atol=1e-3)
    if exit != "continue":
        assert bool(hull.contains(edited, 1e-4).all())
    assert torch.allclose(edited[2], alpha, atol=1e-5)  # strength 0


@given(hulls, st.integers(0, 999), st.sampled_from(["stop", "continue", "project"]), st.booleans(), st.floats(0.1, 100))
def test_no_strength_layer_or_exit_changes_the_sum(hull: Hull, seed: int, exit, per_layer: bool, far: float) -> None:
    hull = hull._replace(anchors=hull.anchors.double())
    direction = personal_direction(hull, draw(seed, hull.anchors.shape[1]))
    assert float(direction.gamma.sum().abs()) < 1e-9 * (1 + float(direction.gamma.abs().max()))
    count = len(hull.anchors)
    alpha = hull.coefficients(draw(seed + 1, 2, 5, count).double() if per_layer else draw(seed + 1, 2, count).double())
    layers = torch.tensor([0, 1, 0.5, -1, 2.0]) if per_layer else None
    strengths = torch.tensor([-far, 0.0, far / 3, far])
    edited = edit_alpha(hull, alpha, direction, strengths, exit=exit, layers=layers)
    assert edited.shape == (4, *alpha.shape)
    assert float((edited.sum(-1) - 1).abs().max()) < 1e-9 * (1 + float(edited.abs().max()) * count)
    if exit != "continue":
        assert bool(hull.contains(edited).all())
    assert torch.allclose(edited[1], alpha, atol=1e-9)
    if per_layer:
        assert torch.allclose(edited[:, :, 0], alpha[:, 0].expand(4, -1, -1), atol=1e-9)


def test_coefficients_and_directions_of_other_anchors_are_refused() -> None:
    hull = make_hull(draw(0, 12, 4))
    direction = personal_direction(hull, draw(1, 4))
    alpha, strengths = hull.coefficients(torch.zeros(1, 12)), torch.tensor([1.0])
    with pytest.raises(ConvloraError, match=r"12 anchors are \(B, 12\).*not \(1, 7\)"):
        edit_alpha(hull, alpha[:, :7], direction, strengths)
    with pytest.raises(ConvloraError, match="direction is of 12 anchors, this hull has 5"):
        edit_alpha(make_hull(draw(0, 5, 4)), torch.full((1, 5), 0.2), direction, strengths)
    with pytest.raises(ConvloraError, match="stop, continue, project, not 'leave'"):
        edit_alpha(hull, alpha, direction, strengths, exit="leave")
    with pytest.raises(ConvloraError, match=r"shape \(6,\); anchors need \(4,\)"):
        personal_direction(hull, draw(1, 6))
    with pytest.raises(ConvloraError, match="at least 2 photos"):
        personal_direction(make_hull(draw(0, 1, 4)), draw(1, 4))


def test_strengths_are_distances_along_the_part_of_the_direction_the_anchors_span() -> None:
    hull = make_hull(10 + draw(0, 40, 8), 4.0)
    normal = draw(1, 8)
    direction = personal_direction(hull, normal)
    assert direction.cosine == pytest.approx(1, abs=1e-4)  # 40 anchors span all of 8 dimensions
    alpha = hull.start((1,)).softmax(-1)
    edited = edit_alpha(hull, alpha, direction, torch.tensor([1.5]))
    moved = hull.w(edited[0]) - hull.w(alpha)
    assert torch.allclose(moved[0], 1.5 * normal / normal.norm(), atol=1e-2)


def test_few_anchors_span_part_of_a_direction_and_say_how_much() -> None:
    hull = make_hull(10 + draw(0, 4, 64))
    assert 0 < personal_direction(hull, draw(1, 64)).cosine < 0.7


def test_stop_keeps_the_last_edit_that_was_inside() -> None:
    hull = make_hull(draw(0, 12, 4), 1.5)
    direction = personal_direction(hull, draw(1, 4))
    alpha = hull.coefficients(torch.zeros(1, 12))
    strengths = torch.linspace(0, 20, 41)
    edited = edit_alpha(hull, alpha, direction, strengths, exit="stop")
    free = edit_alpha(hull, alpha, direction, strengths)
    inside = hull.contains(free)[:, 0]
    last = int(inside.nonzero().max())
    assert 0 < last < 40
    assert torch.equal(edited[: last + 1], free[: last + 1])
    assert torch.equal(edited[last:], free[last].expand(41 - last, -1, -1))


def test_layers_confine_an_edit() -> None:
    hull = make_hull(draw(0, 12, 4))
    direction = personal_direction(hull, draw(1, 4))
    alpha = hull.coefficients(torch.zeros(2, 6, 12))
    layers = torch.tensor([0.0, 0, 1, 1, 0, 0])
    edited = edit_alpha(hull, alpha, direction, torch.tensor([0.5]), layers=layers)
    assert torch.equal(edited[0, :, layers == 0], alpha[:, layers == 0])
    assert not torch.equal(edited[0, :, 2], alpha[:, 2])
    with pytest.raises(ConvloraError, match="per layer"):
        edit_alpha(hull, alpha[:, 0], direction, torch.tensor([0.5]), layers=layers)


def test_equal_anchors_have_no_inside() -> None:
    with pytest.raises(ConvloraError, match="same latent"):
        personal_direction(make_hull(torch.ones(5, 4)), draw(0, 4))


def test_edits_are_rendered_for_every_strength_and_latent() -> None:
    G = tiny_generator()
    hull = make_hull(draw(0, 12, G.w_dim), 1.2)
    direction = personal_direction(hull, draw(1, G.w_dim))
    alpha, labels = hull.coefficients(draw(2, 2, 12)), cameras.random_views(2, seed=0)
    found = edit(G, hull, alpha, direction, torch.tensor([0.0, 50.0]), labels, exit="continue")
    assert found.images.shape == (2, 2, 3, G.img_resolution, G.img_resolution)
    assert found.inside.tolist() == [[True, True], [False, False]]
    own = novel_views(G, hull.w(alpha), labels[:, None])[:, 0]
    assert torch.allclose(found.images[0], own, atol=1e-4)
