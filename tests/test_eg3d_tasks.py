"""Tasks on a small generator: what each promises, on pretrained, fully tuned and adapted ones alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import randomize
from tiny import tiny_generator, tiny_photos

import convlora
from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.tasks import inpaint, invert, make_hull, novel_views, project, upscale
from convlora.integrations.eg3d.tasks.degrade import center_hole, downsample

QUIET = dict(progress=False)


@pytest.fixture(scope="module", params=["pretrained", "adapted"])
def G(request):
    G = tiny_generator()
    if request.param == "adapted":
        adapter = convlora.inject_lora(G, rank=1, targets=["backbone.synthesis.*"])
        randomize(adapter)
        for p in adapter.parameters():
            p.requires_grad_(False)
    return G


@pytest.fixture(scope="module")
def hull(G):
    return make_hull(G.mapping(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), cameras.frontal(6))[:, 0])


@pytest.fixture(scope="module")
def inside(G, hull) -> Photos:
    """Photos that the generator itself took of points of the hull."""
    alpha = hull.coefficients(torch.randn(2, 6, generator=torch.Generator().manual_seed(1)))
    labels = cameras.random_views(2, seed=3)
    return Photos(novel_views(G, hull.w(alpha), labels[:, None])[:, 0], labels, ["a.png", "b.png"])


def state(G) -> dict:
    return {key: value.clone() for key, value in G.state_dict().items()}


def error(a, b) -> float:
    return float((a - b).square().mean())


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("parametrisation", ["exact", "mystyle"])
def test_projection_finds_points_of_the_hull(G, hull, inside, per_layer, parametrisation) -> None:
    before = state(G)
    start = project(G, inside, hull, 1, per_layer=per_layer, parametrisation=parametrisation, lr=0.0, **QUIET)
    found = project(G, inside, hull, 25, per_layer=per_layer, parametrisation=parametrisation, **QUIET)
    shape = (2, G.num_ws, 6) if per_layer else (2, 6)
    assert found.alpha.shape == shape and found.ws.shape == (2, G.num_ws, 8)
    assert bool((found.loss < start.loss).all())
    assert error(found.images, inside.images) < 0.7 * error(start.images, inside.images)
    assert torch.allclose(found.alpha.sum(-1), torch.ones(shape[:-1]), atol=1e-5)
    if parametrisation == "exact":
        assert bool(hull.contains(found.alpha).all())
    assert all(torch.equal(value, before[key]) for key, value in G.state_dict().items())


def test_photos_are_projected_independently_of_their_batch(G, hull, inside) -> None:
    torch.manual_seed(0)
    together = project(G, inside, hull, 3, **QUIET)
    apart = project(G, inside, hull, 3, batch_size=1, **QUIET)
    assert torch.allclose(together.alpha, apart.alpha, atol=0.05)  # rays are jittered by other random numbers


def test_wrong_projections_are_named(G, hull, inside) -> None:
    with pytest.raises(ConvloraError, match="3 wide.*latents 8"):
        project(G, inside, make_hull(torch.randn(4, 3)), 1, **QUIET)
    with pytest.raises(ConvloraError, match="steps"):
        project(G, inside, hull, 0, **QUIET)
    with pytest.raises(ConvloraError, match="16, 16.*128, 128"):
        project(G, inside, hull, 1, degrade=lambda x: downsample(x, 8), **QUIET)
    broken = replace(inside, images=torch.full_like(inside.images, float("nan")))
    with pytest.raises(ConvloraError, match="a.png, b.png diverged by step 1"):
        project(G, broken, hull, 1, **QUIET)


def test_inpainting_never_looks_into_the_hole_and_keeps_the_rest(G, hull, inside) -> None:
    side = G.img_resolution
    known = center_hole(side, 0.4)
    spoilt = replace(inside, images=torch.where(known > 0, inside.images, torch.tensor(float("nan"))))
    results = []
    for photos in (inside, spoilt):
        torch.manual_seed(0)
        results.append(inpaint(G, photos, hull, known, 8, how="paste", **QUIET))
    assert torch.equal(results[0].projection.alpha, results[1].projection.alpha)
    assert bool(results[1].images.isfinite().all())
    kept = known.expand_as(inside.images) > 0
    assert torch.equal(results[0].images[kept], inside.images[kept])
    assert torch.equal(results[0].images[~kept], results[0].projection.images[~kept])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 64, 64), r"\(1, 1, 64, 64\)"), (torch.zeros(1, 1, 128, 128), "nothing of a.png, b.png"),
        (torch.full((1, 1, 128, 128), 255.0), "255"),
    ],
)  # fmt: skip
def test_wrong_masks_are_refused_before_anything_runs(G, hull, inside, mask, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        inpaint(G, inside, hull, mask, 10**6, **QUIET)


def test_upscaling_agrees_with_the_small_photo(G, hull, inside) -> None:
    small = replace(inside, images=downsample(inside.images, 8))
    found = upscale(G, small, hull, 25, **QUIET)
    assert found.images.shape == inside.images.shape
    first = upscale(G, small, hull, 1, lr=0.0, **QUIET)
    assert error(downsample(found.images, 8), small.images) < 0.7 * error(downsample(first.images, 8), small.images)
    for wrong in (inside.images, torch.zeros(2, 3, 48, 48)):
        with pytest.raises(ConvloraError, match="cannot be upscaled to 128"):
            upscale(G, replace(inside, images=wrong), hull, 1, **QUIET)


@pytest.mark.parametrize("target", ["none", "all", "adapter"])
def test_inversion_leaves_the_generator_as_it_was(G, target, tmp_path) -> None:
    before, photos = state(G), tiny_photos(2)
    views = cameras.random_views(3, seed=1)
    found = invert(G, photos, 4, 6, target=target, views=views, out=tmp_path, lr_tune=0.005, **QUIET)
    after = G.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    assert found.images.shape == (2, 3, 128, 128) and found.views.shape == (2, 3, 3, 128, 128)
    latent = invert(G, photos, 4, 0, target=target, **QUIET)
    assert torch.equal(found.w, latent.w)
    if target != "none":
        assert error(found.images, photos.images) < error(latent.images, photos.images)


def test_the_adapter_of_a_photo_is_small_stacks_on_a_person_s_and_reproduces_its_picture(G, tmp_path) -> None:
    photos = tiny_photos(2)
    found = invert(G, photos, 4, 6, target="adapter", out=tmp_path, lr_tune=0.005, **QUIET)
    assert [path.name for path in found.adapters] == ["photo_00.safetensors", "photo_01.safetensors"]
    adapter = convlora.load_adapter(G, found.adapters[1], name="again")
    try:
        assert torch.equal(novel_views(G, found.w[1:], found.labels[1:, None])[0, 0], found.images[1])
    finally:
        adapter.remove()
    times = [path.stat().st_mtime_ns for path in found.adapters]
    resumed = invert(G, photos, 4, 6, target="adapter", out=tmp_path, lr_tune=0.005, **QUIET)
    assert torch.equal(resumed.images, found.images) and [p.stat().st_mtime_ns for p in resumed.adapters] == times


def test_tuning_that_diverges_says_where(G) -> None:
    photos = tiny_photos(1)
    with pytest.raises(ConvloraError, match="photo_00.png diverged at step"):
        invert(G, photos, 1, 30, target="all", lr_tune=1e30, **QUIET)
    with pytest.raises(ConvloraError, match="some"):
        invert(G, photos, 1, 1, target="some", **QUIET)
