"""Masks: padded pixels count for nothing, and without masks nothing is as it was not."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import SIDE, tiny_generator, tiny_photos, write_tiny_album

from convlora.errors import AlbumError
from convlora.integrations.eg3d.album import load_album, masked_resize, resize
from convlora.integrations.eg3d.anchors import find_anchors, w_statistics
from convlora.integrations.eg3d.losses import completed, filled, masked_mean, photo_loss, reconstruct
from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.personalize import inject_personal, parameter_groups, personalize, tune
from convlora.integrations.eg3d.renderer import Samples

KERNEL = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def perceptual(a, b):
    """A distance whose features reach over five pixels, as networks' do; linear features."""
    return (F.conv2d(a, KERNEL, padding=2) - F.conv2d(b, KERNEL, padding=2)).square().mean((1, 2, 3))


def masks(count, seed=0):
    """A padded band at the left or the top, with a soft border."""
    ramp = ((torch.arange(SIDE) - 20.0) / 6).clamp(0, 1)
    vertical, horizontal = ramp.expand(1, SIDE, SIDE), ramp[:, None].expand(1, SIDE, SIDE)
    return torch.stack([vertical if i % 2 else horizontal for i in range(count)])


def spoiled(photos, value):
    """The same photos with something else where they are padded."""
    return replace(photos, images=torch.where(photos.masks > 0, photos.images, value))


@pytest.fixture
def padded():
    photos = tiny_photos(4)
    return replace(photos, masks=masks(4))


def old_loss(out, target, perceptual, weight):
    """The loss as it was before there were masks."""
    total = torch.zeros(len(target))
    for image in (out["image_raw"], out["image"]):
        truth = resize(target, image.shape[-1])
        total = total + (image - truth).square().mean((1, 2, 3))
        total = total + weight * perceptual(image, truth).flatten()
    return total


def test_without_masks_and_refinement_anchors_are_bit_for_bit_those_of_the_plain_loop():
    G, photos, steps, lr = tiny_generator(), tiny_photos(3), 6, 0.1
    mean, spread = w_statistics(G)
    own = [torch.Generator().manual_seed(5 + i) for i in range(3)]  # each photo's
    w = mean.expand(3, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr)
    for step in range(steps):
        t = (step + 1) / steps
        ramp = (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25 + 1e-3))) * min(1.0, t / 0.05)
        optimizer.param_groups[0]["lr"] = lr * ramp
        normal = torch.stack([torch.randn(8, generator=generator) for generator in own])
        samples = Samples(*map(torch.cat, zip(*(G.samples(1, generator=generator) for generator in own))))
        noisy = w + normal * (spread * 0.05 * max(0.0, 1 - t / 0.75) ** 2)
        each = old_loss(reconstruct(G, noisy, photos.labels, samples=samples), photos.images, perceptual, 0.7)
        optimizer.zero_grad(set_to_none=True)
        each.sum().backward()
        optimizer.step()
    found = find_anchors(G, photos, steps, lr=lr, perceptual=perceptual, perceptual_weight=0.7, seed=5, progress=False)
    assert torch.equal(found.w, w) and torch.equal(found.loss, each)
    assert found.labels is None and found.moved_degrees is None


def test_without_masks_tuning_is_bit_for_bit_that_of_the_plain_loop():
    G, photos, steps = tiny_generator(), tiny_photos(3), 5
    anchors = find_anchors(G, photos, 2, progress=False)
    model, plain = copy.deepcopy(G), copy.deepcopy(G)
    torch.manual_seed(0)
    adapter = inject_personal(model)
    groups = parameter_groups(adapter, 0.01, 0.002)
    history = tune(model, photos, anchors, groups, steps=steps, batch_size=3, perceptual=perceptual, progress=False)
    torch.manual_seed(0)
    twin = inject_personal(plain)
    optimizer = torch.optim.Adam(parameter_groups(twin, 0.01, 0.002), lr=0.002, betas=(0.0, 0.992), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.55 + 0.45 * math.cos(math.pi * min(1.0, s / steps))
    )
    order = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        batch = torch.randperm(3, generator=order)
        torch.manual_seed(step)
        out = reconstruct(plain, anchors.w[batch], photos.labels[batch])
        loss = old_loss(out, photos.images[batch], perceptual, 1.0)
        losses.append(loss.mean().detach())
        optimizer.zero_grad(set_to_none=True)
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in adapter.state_dict().items())
    (told,) = history  # the mean over photos and steps at once, rounded otherwise than that of the means
    assert told == (steps, pytest.approx(float(torch.stack(losses).mean()), rel=1e-6))


def learnt(photos):
    """All that comes of photos: latents from an encoder's start, refined cameras, an adapter."""
    G = tiny_generator()
    anchors = find_anchors(
        G, photos, 2, lr=0.1, init=lambda images, labels: images.mean((2, 3)) @ torch.ones(3, G.w_dim),
        perceptual=perceptual, refine_camera="full", progress=False,
    )  # fmt: skip
    torch.manual_seed(0)
    adapter = personalize(G, photos, anchors, steps=2, batch_size=2, perceptual=perceptual, progress=False)
    return [anchors.w, anchors.labels, anchors.loss, *adapter.state_dict().values()]


def test_garbage_in_padded_pixels_changes_neither_anchors_nor_the_adapter():
    photos = replace(tiny_photos(2), masks=masks(2))
    clean = learnt(photos)
    for garbage in (-50.0, float("nan")):
        for x, y in zip(clean, learnt(spoiled(photos, garbage))):
            assert torch.equal(x, y) and x.isfinite().all()
    assert not torch.equal(learnt(replace(photos, masks=None))[0], clean[0]), "the mask matters"


def test_a_mask_of_ones_is_no_mask():
    G, photos = tiny_generator(), tiny_photos(2)
    out = reconstruct(G, w_statistics(G)[0].expand(2, -1), photos.labels)
    ones = torch.ones(2, 1, SIDE, SIDE)
    torch.testing.assert_close(
        photo_loss(out, photos.images, perceptual, 0.7, ones), photo_loss(out, photos.images, perceptual, 0.7)
    )
    torch.testing.assert_close(psnr(out["image"], photos.images, ones), psnr(out["image"], photos.images))


def test_padded_pixels_get_no_gradient(padded):
    """Also not through features that straddle the border: see `completed`."""
    hard = (padded.masks > 0.5).float()
    image = torch.rand(4, 3, SIDE, SIDE).requires_grad_()
    photo_loss({"image": image}, padded.images, perceptual, 1.0, hard).sum().backward()
    outside = (hard == 0).expand_as(image)
    assert image.grad[outside].abs().max() < 1e-6 * image.grad[~outside].abs().max()


def test_the_masked_loss_is_the_loss_of_the_true_part():
    photos = tiny_photos(1)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 32:] = 1
    out = {"image": torch.rand(1, 3, SIDE, SIDE)}
    wanted = (out["image"][..., 32:] - photos.images[..., 32:]).square().mean()
    torch.testing.assert_close(photo_loss(out, photos.images, None, mask=mask), wanted[None])
    wanted = psnr(out["image"][..., 32:], photos.images[..., 32:])
    torch.testing.assert_close(psnr(out["image"], photos.images, mask), wanted)
    torch.testing.assert_close(masked_mean(out["image"], mask), out["image"][..., 32:].mean().view(1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(5, 16), st.integers(2, 4))
def test_masked_resizing_mixes_true_pixels_only(seed, small, factor):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, small * factor, small * factor, generator=generator)
    soft = (2 * torch.rand(2, 1, small * factor, small * factor, generator=generator) - 0.7).clamp(0, 1)
    resized, weight = masked_resize(images, soft, small)
    other, _ = masked_resize(torch.where(soft > 0, images, 1e6), soft, small)
    assert torch.equal(resized, other)
    assert 0 <= weight.min() and weight.max() <= 1
    seen = (weight > 0).expand_as(resized)
    assert resized[seen].min() >= images.min() - 1e-4 and resized[seen].max() <= images.max() + 1e-4
    constant, _ = masked_resize(torch.full_like(images, 0.3), soft, small)
    torch.testing.assert_close(constant[seen], torch.full_like(constant[seen], 0.3))


def test_completing_and_filling():
    target, image = torch.full((1, 3, 4, 4), float("nan")), torch.rand(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    target[..., 2:] = torch.rand(1, 3, 4, 2)
    done = completed(target, mask, image)
    assert torch.equal(done[..., 2:], target[..., 2:]) and torch.equal(done[..., :2], image[..., :2])
    full = filled(target, mask)
    torch.testing.assert_close(full[..., :2], target[..., 2:].mean((2, 3), keepdim=True).expand(-1, -1, 4, 2))


# ---- albums --------------------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    folder = write_tiny_album(tmp_path / "album", 4)
    (folder / "masks").mkdir()
    return folder


def write_mask(album, name, size=(SIDE, SIDE), mode="L", border=20):
    mask = Image.new(mode, size, 255 if mode == "L" else (255, 255, 255))
    mask.paste(0 if mode == "L" else (0, 0, 0), (0, 0, border, size[1]))
    mask.save(album / "masks" / name)


def test_masks_are_read_with_their_photos(album):
    write_mask(album, "photo_02.png")
    train = load_album(album, SIDE).train
    assert train.masks.shape == (4, 1, SIDE, SIDE)
    assert train.masks[[0, 1, 3]].min() == 1
    assert train.masks[2, 0, :, :20].max() == 0 and train.masks[2, 0, :, 20:].min() == 1
    moved = train.to("cpu").first(3)
    assert torch.equal(moved.masks, train.masks[:3])
    split = load_album(album, SIDE, held_out=2)
    assert (split.test.names, split.train.masks) == (["photo_00.png", "photo_02.png"], None)
    assert split.test.masks.shape == (2, 1, SIDE, SIDE)


def test_without_masks_there_are_none(album):
    assert load_album(album, SIDE).train.masks is None


def test_a_large_photos_padding_stays_out_of_its_reduction(album):
    for path in album.glob("photo_*.png"):
        large = Image.open(path).resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
        large.paste((255, 0, 0), (0, 0, 42, 2 * SIDE))
        large.save(path)
    write_mask(album, "photo_01.png", (2 * SIDE, 2 * SIDE), border=42)
    photos, truth = load_album(album, SIDE).train, tiny_photos(4)
    torch.testing.assert_close(photos.images[1, :, :, 21:], truth.images[1, :, :, 21:], atol=0.02, rtol=0)
    assert 0.05 < photos.masks[1, 0, :, 20].mean() < 0.3
    assert (photos.images[0, 0, :, 21] - truth.images[0, 0, :, 21]).abs().max() > 0.02, "without a mask red reaches it"


SPOILED = {
    "size": (lambda a: write_mask(a, "photo_01.png", (64, 64)), "is 64 × 64, its photo 128 × 128"),
    "mode": (lambda a: write_mask(a, "photo_01.png", mode="RGB"), "mode RGB, masks must be 8-bit grey"),
    "black": (lambda a: write_mask(a, "photo_01.png", border=SIDE), "all black: no pixel of photo_01.png"),
    "stray": (lambda a: write_mask(a, "photo_17.png"), "holds photo_17.png, of no photo"),
    "broken": (lambda a: (a / "masks" / "photo_01.png").write_bytes(b"no"), "not a readable picture"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_mask_is_refused(album, case):
    spoil, message = SPOILED[case]
    spoil(album)
    with pytest.raises(AlbumError, match=message):
        load_album(album, SIDE)


def test_consent_and_the_cameras_origin_come_from_the_manifest(album):
    loaded = load_album(album, SIDE)
    assert (loaded.consent, loaded.face_model) == ("not recorded", None)
    (album / "manifest.json").write_text('{"consent": "agreed, 1 May", "face_model": "face"}')
    loaded = load_album(album, SIDE)
    assert (loaded.consent, loaded.face_model) == ("agreed, 1 May", "face")
