"""Styles draw as they say, on any picture alone; a style's adapter learns it from heads whose latents are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_generator

from convlora import Adapter
from convlora.errors import ConvloraError, FileError, RankError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import lab
from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.blocks import masked_ranks
from convlora.integrations.eg3d.lab.style_adapter import (
    STYLE_SEEDS,
    Heads,
    inject_style,
    ordinary_heads,
    style_adapter,
)
from convlora.integrations.eg3d.lab.styles import PALETTE, STYLES, style_named
from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.networks import lab_networks
from convlora.integrations.eg3d.tasks import novel_views


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    """(3, 3, 64, 64)"""
    return torch.cat([lab.photos(lab.Person("", seed), "train", 1, 64).images for seed in (1, 2, 3)])


@pytest.mark.parametrize("name", STYLES)
def test_every_picture_is_drawn_over_alone_and_within_range(name, drawings) -> None:
    style = STYLES[name]
    found = style(drawings)
    assert found.shape == drawings.shape and found.dtype == drawings.dtype
    assert float(found.min()) >= -1 and float(found.max()) <= 1
    torch.testing.assert_close(found, torch.cat([style(one[None]) for one in drawings]), atol=2e-6, rtol=0)
    torch.testing.assert_close(found, style(drawings.double()).float(), atol=1e-4, rtol=0)
    assert torch.equal(found, style(drawings))
    for side in (1, 7, 33):
        assert style(torch.rand(2, 3, side, side) * 2 - 1).isfinite().all()


@pytest.mark.parametrize("name", ["cartoon", "palette"])
def test_a_larger_picture_gets_the_same_drawing(name) -> None:
    large = lab.photos(lab.Person("", 4), "train", 1, 256).images
    style = STYLES[name]
    there = resize(style(large), 128)
    here = style(resize(large, 128))
    other = style(resize(lab.photos(lab.Person("", 5), "train", 1, 256).images, 128))
    assert (there - here).abs().mean() < 0.25 * (there - other).abs().mean()


def test_styles_are_told_apart_by_the_perceptual_distance(drawings) -> None:
    perceptual = lab_networks().perceptual
    assert perceptual is not None
    drawn = {"": drawings, **{name: style(drawings) for name, style in STYLES.items()}}
    for a in drawn:
        for b in drawn:
            distance = perceptual(drawn[a], drawn[b])
            assert bool((distance > 0.02).all()) if a != b else bool((distance == 0).all())


def test_a_cartoon_has_few_shades_and_dark_lines() -> None:
    ramp = torch.linspace(-1, 1, 256).expand(1, 3, 256, 256)
    drawn = STYLES["cartoon"](ramp)[0, 0, 128] * 0.5 + 0.5
    middles = (torch.arange(6) + 0.5) / 6

    def near(values: torch.Tensor) -> float:
        return float(((values[:, None] - middles).abs().amin(1) < 0.02).float().mean())

    assert near(torch.linspace(0, 1, 256)) < 0.3 and near(drawn) > 0.6
    edge = torch.where(torch.arange(128) < 64, -0.2, 0.6).expand(1, 3, 128, 128)
    row = STYLES["cartoon"](edge)[0, 1, 64]
    assert row[58:64].min() < row[20] - 0.5 and row[64:70].min() > row[20]  # the line lies on the darker side


def test_a_sketch_is_pencil_on_paper_hatched_where_it_is_dark(drawings) -> None:
    drawn = STYLES["sketch"](drawings).permute(0, 2, 3, 1).reshape(-1, 3).double()
    paper, pencil = STYLES["sketch"](torch.ones(1, 3, 64, 64))[0, :, 32, 32].double(), drawn[drawn.sum(1).argmin()]
    across = torch.linalg.vecdot(drawn - paper, (pencil - paper)[None]) / (pencil - paper).square().sum()
    off = drawn - paper - across[:, None] * (pencil - paper)
    assert off.abs().max() < 0.01  # every colour is a mixture of the two
    light, dark = (STYLES["sketch"](torch.full((1, 3, 128, 128), x))[0, 0] for x in (0.9, -0.9))
    assert light.std() < 1e-3 and dark.std() > 0.02
    spectrum = np.abs(np.fft.fft2(dark.numpy() - float(dark.mean())))
    strongest = np.unravel_index(spectrum.argmax(), spectrum.shape)
    assert {min(int(k), 128 - int(k)) for k in strongest} == {32}  # 32 strokes across, slanted


def test_a_palette_prints_nine_inks(drawings) -> None:
    inks = torch.tensor(PALETTE) * 2 - 1
    flat = inks[:, :, None, None].expand(-1, -1, 32, 32)
    torch.testing.assert_close(STYLES["palette"](flat), flat.contiguous(), atol=0.02, rtol=0)

    def pure(images: torch.Tensor) -> float:
        pixels = images.permute(0, 2, 3, 1).reshape(-1, 1, 3)
        return float(((pixels - inks).abs().amax(2).amin(1) < 0.1).float().mean())

    assert pure(STYLES["palette"](drawings)) > 0.5 > 5 * pure(drawings)


def test_what_is_no_picture_and_no_style_is_refused() -> None:
    with pytest.raises(ConvloraError, match=r"images \(N, 3, R, R\).*not \(3, 8, 8\)"):
        STYLES["sketch"](torch.zeros(3, 8, 8))
    with pytest.raises(ConvloraError, match=r"not \(1, 3, 8, 9\)"):
        STYLES["cartoon"](torch.zeros(1, 3, 8, 9))
    with pytest.raises(ConvloraError, match="torch.uint8"):
        STYLES["palette"](torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConvloraError, match="no style 'oil'; choose one of cartoon, sketch, palette"):
        style_named("oil")


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def prior() -> eg3d.TriPlaneGenerator:
    G = eg3d.load_generator("lab").requires_grad_(False)
    G.neural_rendering_resolution = 32
    return G


@pytest.fixture(scope="module")
def heads(prior) -> Heads:
    return ordinary_heads(prior, 4)


def test_heads_are_what_the_prior_draws_from_their_latents(prior, heads) -> None:
    own = novel_views(prior, heads.w, heads.photos.labels[:, None])[:, 0]
    others = own.roll(1, 0)
    assert bool((psnr(own, heads.photos.images) > psnr(others, heads.photos.images) + 3).all())
    assert psnr(own, heads.photos.images).min() > 18
    assert len(set(heads.photos.names)) == 4 and heads.photos.names[0] == f"Person {STYLE_SEEDS}"
    fewer = ordinary_heads(prior, 2)
    assert torch.equal(fewer.photos.images, heads.photos.images[:2])
    torch.testing.assert_close(fewer.w, heads.w[:2])


def test_heads_nobody_is_measured_with_and_that_fit_are_asked_for(prior) -> None:
    with pytest.raises(ConvloraError, match="count=0 heads from seed 500000"):
        ordinary_heads(prior, 0)
    with pytest.raises(ConvloraError, match="seeds stay below 899996"):
        ordinary_heads(prior, 2, first=899_999)
    with pytest.raises(ConvloraError, match="z has 8 numbers, and a head of the lab has 59"):
        ordinary_heads(tiny_generator(), 1)


def test_a_mask_trains_its_blocks_alone_and_never_the_decoder(prior) -> None:
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    adapter = inject_style(prior, 4, masked_ranks(prior, ("middle", "sr")))
    try:
        blocks = {name.split(".")[2] if name.startswith("b") else name.split(".")[0] for name in adapter.layers}
        assert blocks == {"b16", "b32", "superresolution"} and not adapter.trained
        ranks = {name: rank for name, (rank, _) in adapter.record.ranks.items()}
        assert ranks.pop("superresolution.block0.torgb") == ranks.pop("superresolution.block1.torgb") == 3
        assert set(ranks.values()) == {4}
    finally:
        adapter.remove()
    with pytest.raises(RankError, match="rank -1 is below 1"):
        inject_style(prior, 4, {"*b8*": -1})
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())


def test_a_style_is_learnt_and_a_finished_checkpoint_is_taken_as_it_is(tmp_path, heads) -> None:
    perceptual = lab_networks().perceptual
    assert perceptual is not None

    def taught() -> tuple[eg3d.TriPlaneGenerator, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        G = eg3d.load_generator("lab").requires_grad_(False)
        G.neural_rendering_resolution = 16
        adapter = style_adapter(
            G, "palette", heads=heads, steps=8, batch_size=2, lr=0.004, perceptual=perceptual,
            checkpoint=tmp_path / "style.ckpt", progress=False,
        )  # fmt: skip
        return G, adapter.state_dict()

    G, first = taught()
    target = STYLES["palette"](heads.photos.images)
    after = novel_views(G, heads.w, heads.photos.labels[:, None])[:, 0]
    with Adapter.of(G, "style").disabled():
        before = novel_views(G, heads.w, heads.photos.labels[:, None])[:, 0]
    assert perceptual(after, target).mean() < 0.97 * perceptual(before, target).mean()
    again = taught()[1]
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    other = eg3d.load_generator("lab").requires_grad_(False)
    with pytest.raises(FileError, match="of a run with other settings"):
        style_adapter(other, "palette", heads=heads, steps=9, checkpoint=tmp_path / "style.ckpt", progress=False)
