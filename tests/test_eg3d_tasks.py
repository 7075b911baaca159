"""Tasks on a small generator: what each promises, on pretrained, fully tuned and adapted ones alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import randomize
from tiny import tiny_generator, tiny_photos
from tqdm import tqdm

import convlora
from convlora import files
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.batches import Watch
from convlora.integrations.eg3d.tasks import inpaint, interpolate, invert, make_hull, novel_views, project, upscale
from convlora.integrations.eg3d.tasks.background import opacity
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
    with pytest.raises(ConvloraError, match="a.png, b.png diverged at step 1 of 1.*NaN in the photo"):
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
        (torch.full((1, 1, 128, 128), 255.0), "255"), (torch.full((1, 1, 128, 128), float("nan")), "nan"),
        (torch.ones(1, 1, 128, 128), "no hole in a.png, b.png"),
    ],
)  # fmt: skip
def test_wrong_masks_are_refused_before_anything_runs(G, hull, inside, mask, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        inpaint(G, inside, hull, mask, 10**6, **QUIET)


def test_what_is_unknown_or_does_not_fit_is_refused_before_anything_runs(G, hull, inside) -> None:
    small, known = replace(inside, images=downsample(inside.images, 8)), center_hole(128)
    nobody, ws = inside.first(0), torch.zeros(1, 14, 512)  # of another generator
    wide = make_hull(torch.randn(4, 512))
    calls = {
        "paste, feather.*'melt'": lambda: inpaint(G, inside, hull, known, 10**6, how="melt", **QUIET),
        "area, bicubic.*'magic'": lambda: upscale(G, small, hull, 10**6, how="magic", **QUIET),
        "exact, mystyle.*'soft'": lambda: project(G, inside, hull, 10**6, parametrisation="soft", **QUIET),
        "at least 2 photos": lambda: project(G, inside, make_hull(torch.randn(1, 8)), 10**6, **QUIET),
        "512 wide.*latents 8": lambda: upscale(G, small, wide, 10**6, **QUIET),
        "512 wide, this generator's latents 8": lambda: inpaint(G, inside, wide, known, 10**6, **QUIET),
        "not 0 photos": lambda: project(G, nobody, hull, 10**6, **QUIET),
        "needs photos.*not 0 photos": lambda: invert(G, nobody, 10**6, **QUIET),
        "project needs photos": lambda: inpaint(G, nobody, hull, known, 10**6, **QUIET),
        r"init gave w of shape \(2, 512\)": lambda: invert(G, inside, 10**6, init=torch.zeros(2, 512), **QUIET),
        r"views need w \(N, 8\).*not \(1, 14, 512\)": lambda: novel_views(G, ws, cameras.frontal(1)),
        r"not \(512,\) and \(8,\)": lambda: interpolate(G, torch.zeros(512), torch.zeros(8), cameras.frontal(1)),
        "weights=1": lambda: interpolate(G, torch.zeros(8), torch.zeros(8), cameras.frontal(1), weights=1),
        r"opacity needs ws \(N, \d+, 8\)": lambda: opacity(G, ws, cameras.frontal(1)),
        "names must differ": lambda: invert(
            G, replace(inside, names=["a.png", "a.jpg"]), 10**6, out="nowhere", **QUIET
        ),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(ConvloraError, match=message):
            call()


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


class Killed(Exception):
    """The process ends here."""


class Distance:
    """A perceptual distance that stops the work, or goes wrong, after some calls."""

    def __init__(self, last: float = float("inf"), then: float | None = None) -> None:
        self.calls, self.last, self.then = 0, last, then

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.last and self.then is None:
            raise Killed
        found = (a - b).abs().mean((1, 2, 3))
        return found if self.calls <= self.last else found * self.then


def fill(G, photos, hull, steps=4, **options):
    return inpaint(G, photos, hull, center_hole(128), steps, how="paste", batch_size=1, **QUIET, **options)


def enlarge(G, photos, hull, steps=4, **options):
    small = replace(photos, images=downsample(photos.images, 8))
    return upscale(G, small, hull, steps, batch_size=1, **QUIET, **options)


def plain(G, photos, hull, steps=4, **options):
    return project(G, photos, hull, steps, per_layer=True, batch_size=1, **QUIET, **options)


def tune_all(G, photos, hull, steps=4, target="all", **options):
    views = cameras.random_views(1, seed=1)
    return invert(G, photos, steps, 3, target=target, views=views, batch_size=1, stop_below=None, **QUIET, **options)


def tune_adapter(G, photos, hull, steps=4, **options):
    return tune_all(G, photos, hull, steps, "adapter", **options)


RESUMING = pytest.mark.parametrize("task", [plain, fill, enlarge, tune_all, tune_adapter])


def tensors(found) -> list[torch.Tensor]:
    parts = [part if isinstance(part, tuple) else (part,) for part in found]
    return [tensor for part in parts for tensor in part if isinstance(tensor, torch.Tensor)]


@RESUMING
def test_killed_work_goes_on_and_ends_where_uninterrupted_work_does(G, hull, inside, task, tmp_path) -> None:
    before = state(G)
    torch.manual_seed(1)
    whole = task(G, inside, hull, perceptual=(distance := Distance()))
    killer = Distance(last=int(0.8 * distance.calls))
    with pytest.raises(Killed):
        task(G, inside, hull, perceptual=killer, out=tmp_path)
    torch.manual_seed(2)  # another process has another random state
    resumed = task(G, inside, hull, perceptual=(rest := Distance()), out=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed), tensors(whole), strict=True))
    assert 0 < rest.calls <= 0.55 * distance.calls, "finished photos are not optimised again"
    task(G, inside, hull, perceptual=(none := Distance()), out=tmp_path)
    assert none.calls <= 2, "at most the loss of a finished adapter's picture"
    assert all(torch.equal(value, before[key]) for key, value in G.state_dict().items())


@RESUMING
def test_a_folder_of_other_arguments_is_refused_and_left_alone(G, hull, inside, task, tmp_path) -> None:
    task(G, inside, hull, out=tmp_path)
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = tiny_generator(seed=5)
    brighter = replace(inside, images=inside.images + 0.01)
    with pytest.raises(FileError, match="steps: 4 there, 5 now"):
        task(G, inside, hull, 5, out=tmp_path)
    with pytest.raises(FileError, match="generator: .* there"):
        task(other, inside, hull, out=tmp_path)
    with pytest.raises(FileError, match="camera of a.png, b.png are not those"):
        task(G, brighter, hull, out=tmp_path)
    with pytest.raises(FileError, match="seed: 0 there, 3 now"):
        task(G, inside, hull, seed=3, out=tmp_path)
    if task in (plain, fill, enlarge):
        with pytest.raises(FileError, match="dilation: 2.0 there, 1.5 now"):
            task(G, inside, make_hull(hull.anchors, 1.5), out=tmp_path)
    else:
        with pytest.raises(FileError, match="rank: 1 there, 2 now"):
            task(G, inside, hull, rank=2, out=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == written


@RESUMING
def test_a_photo_of_nan_is_named_and_those_before_it_are_kept(G, hull, inside, task, tmp_path) -> None:
    before = state(G)
    images = inside.images.clone()
    images[1] = float("nan")
    with pytest.raises(ConvloraError, match=r"of b\.png diverged at step 1 of 4 .*NaN in the photo.*is kept in"):
        task(G, replace(inside, images=images), hull, out=tmp_path)
    found = task(G, inside.first(1), hull, perceptual=None, out=tmp_path)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(found))
    assert all(torch.equal(value, before[key]) for key, value in G.state_dict().items())


@RESUMING
def test_a_loss_that_becomes_nan_names_the_step_and_what_to_do(G, hull, inside, task, tmp_path) -> None:
    before = state(G)
    bad = Distance(last=5, then=float("nan"))
    with pytest.raises(ConvloraError, match=r"a\.png diverged at step [36] of 12 \(lr=.*lower lr=0"):
        task(G, inside, hull, 12, perceptual=bad, out=tmp_path)
    assert not list(tmp_path.iterdir()), "nothing that is not finite is kept"
    assert all(torch.equal(value, before[key]) for key, value in G.state_dict().items())


def test_losses_are_looked_at_every_tenth_step_and_the_step_is_exact() -> None:
    with tqdm(disable=True) as bar:
        watch = Watch(bar, "tuning to", ["a.png", "b.png", "c.png"], 100, "lr=0.1")
        for step in range(20):
            watch.see(step, torch.tensor([1.0, float("nan") if step > 12 else 1.0, float("inf") if step == 15 else 1]))
        with pytest.raises(ConvloraError, match=r"tuning to b.png, c.png diverged at step 14 of 100 \(lr=0.1\)"):
            watch.see(20, torch.ones(3))
        watch = Watch(bar, "tuning to", ["a.png"], 100, "lr=0.1")
        with pytest.raises(ConvloraError, match="diverged at step 100 of 100"):
            watch.check(w=torch.tensor([[1.0, float("inf")]]))


def test_a_damaged_file_of_finished_batches_is_refused(G, hull, inside, tmp_path) -> None:
    file = tmp_path / "coefficients.safetensors"
    plain(G, inside, hull, out=tmp_path)
    whole, (kept, metadata) = file.read_bytes(), files.read(file)
    for content, message in (
        (whole[: len(whole) // 2], "truncated"),
        (({**kept, "loss": kept["loss"][:1]}, metadata), "damaged: 2 names and other numbers"),
        ((kept, {**metadata, "names": "a.png"}), "damaged: its names are no list"),
        ((kept, {**metadata, "names": "{}"}), "damaged: its names are no list"),
        ((kept, {**metadata, "format": "convlora-anchors"}), "is no convlora-projection file"),
    ):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            files.write(file, *content)
        with pytest.raises(FileError, match=message):
            plain(G, inside, hull, out=tmp_path)
    file.write_bytes(whole)
    plain(G, inside, hull, perceptual=None, out=tmp_path)


def test_anchors_may_be_found_in_other_batches_and_of_more_photos(G, tmp_path) -> None:
    photos, file = tiny_photos(3), tmp_path / "anchors.safetensors"
    first = find_anchors(G, photos.first(2), 2, checkpoint=file, **QUIET)
    more = find_anchors(G, photos, 2, batch_size=1, checkpoint=file, **QUIET)
    assert torch.equal(more.w[:2], first.w) and len(more.w) == 3
    fewer = find_anchors(G, photos.first(1), 2, checkpoint=file, **QUIET)
    assert torch.equal(fewer.w, first.w[:1]) and fewer.names == photos.names[:1]
    assert Anchors.load(file).names == photos.names


def test_tuning_that_diverges_says_where(G) -> None:
    photos = tiny_photos(1)
    for target in ("all", "adapter"):
        with pytest.raises(ConvloraError, match=r"photo_00.png diverged at step [23] of 30 .*lower lr_tune=1e\+30"):
            invert(G, photos, 1, 30, target=target, lr_tune=1e30, **QUIET)
    with pytest.raises(ConvloraError, match="some"):
        invert(G, photos, 1, 1, target="some", **QUIET)
