"""Inversion and personalisation on a tiny EG3D: they learn, resume exactly, and count what the paper counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny_generator, tiny_photos

import convlora
from convlora.errors import ConvloraError, FileError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.batches import Kept
from convlora.integrations.eg3d.losses import photo_loss, reconstruct
from convlora.integrations.eg3d.metrics import id_sim, psnr
from convlora.integrations.eg3d.personalize import TARGETS, inject_personal, personalize, tune, unfreeze
from convlora.integrations.eg3d.tasks import interpolate, novel_views


@pytest.fixture(scope="module")
def found():
    G, photos = tiny_generator(), tiny_photos(4)
    return G, photos, find_anchors(G, photos, 12, lr=0.1, batch_size=2, progress=False)


def test_inversion_brings_photos_closer_and_keeps_their_order(found):
    G, photos, anchors = found
    short = find_anchors(G, photos, 1, lr=0.0, batch_size=4, noise=0.0, progress=False)
    assert anchors.names == photos.names and anchors.w.shape == (4, G.w_dim)
    assert (anchors.loss < short.loss).all()
    assert not any(p.requires_grad for p in G.parameters())


def test_inversion_resumes_after_a_kill(found, tmp_path, monkeypatch):
    G, photos, anchors = found
    file = tmp_path / "anchors.safetensors"
    original, calls = Kept.write, []

    def killed(self, *results):
        original(self, *results)
        calls.append(self.path)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "write", killed)
    arguments = dict(steps=12, lr=0.1, batch_size=2, progress=False, checkpoint=file)
    with pytest.raises(KeyboardInterrupt):
        find_anchors(G, photos, **arguments)
    assert Anchors.load(file).names == photos.names[:2]
    resumed = find_anchors(G, photos, **arguments)
    assert torch.equal(resumed.w, anchors.w) and Anchors.load(file).names == photos.names
    with pytest.raises(FileError, match="of other photos"):
        find_anchors(G, replace(photos, names=list("abcd")), **arguments)


@pytest.mark.parametrize("init", ["random", lambda images, labels: torch.zeros(len(images), 8), torch.ones(4, 8)])
def test_starts_of_inversion(found, init):
    G, photos, _ = found
    assert find_anchors(G, photos, 1, init=init, progress=False).w.isfinite().all()


def test_wrong_starts_are_named(found):
    G, photos, _ = found
    with pytest.raises(ConvloraError, match="'middle'"):
        find_anchors(G, photos, 1, init="middle")
    with pytest.raises(ConvloraError, match=r"shape \(2, 8\); \(4, 8\) is needed"):
        find_anchors(G, photos, 1, init=torch.zeros(2, 8))
    with pytest.raises(ConvloraError, match="steps ≥ 1"):
        find_anchors(G, photos, 0)


def test_a_diverging_inversion_names_the_photos(found):
    G, photos, _ = found
    bad = replace(photos, images=photos.images * float("nan"))
    with pytest.raises(ConvloraError, match="inversion of photo_00.png, .* diverged"):
        find_anchors(G, bad, 1, progress=False)


@pytest.mark.parametrize("preset", ["true_rank", "paper", "official_code"])
def test_personalising_lowers_the_loss_and_the_file_reproduces_it(found, preset, tmp_path):
    G, photos, anchors = found
    model = copy.deepcopy(G)
    before = novel_views(model, anchors.w, photos.labels[:, None])[:, 0]
    adapter = personalize(model, photos, anchors, preset=preset, steps=12, lr=0.01, batch_size=4, progress=False)
    after = novel_views(model, anchors.w, photos.labels[:, None])[:, 0]
    assert psnr(after, photos.images).mean() > psnr(before, photos.images).mean() + 1
    fresh = copy.deepcopy(G)
    convlora.load_adapter(fresh, adapter.save(tmp_path / "me.safetensors"))
    assert torch.equal(novel_views(fresh, anchors.w, photos.labels[:, None])[:, 0], after)
    with adapter.disabled():
        assert torch.equal(novel_views(model, anchors.w, photos.labels[:, None])[:, 0], before)


def test_tuning_resumes_exactly(found, tmp_path):
    G, photos, anchors = found

    def run(steps_before_kill, file):
        model = copy.deepcopy(G)
        torch.manual_seed(0)
        adapter = inject_personal(model)
        groups = [{"params": list(adapter.parameters()), "lr": 0.01}]

        class Killed(Exception):
            pass

        def perceptual(a, b):
            perceptual.calls += 1
            if perceptual.calls > 2 * steps_before_kill:
                raise Killed
            return (a - b).abs().mean((1, 2, 3))

        perceptual.calls = 0
        try:
            history = tune(model, photos, anchors, groups, steps=30, batch_size=3, perceptual=perceptual,
                           checkpoint=file, checkpoint_seconds=0, progress=False)  # fmt: skip
        except Killed:
            return None
        return adapter.state_dict(), history

    whole = run(100, None)
    assert run(14, tmp_path / "run.ckpt") is None  # a checkpoint was written at step 10
    resumed = run(100, tmp_path / "run.ckpt")
    assert all(torch.equal(resumed[0][key], value) for key, value in whole[0].items())
    assert resumed[1] == whole[1]
    with pytest.raises(FileError, match="other settings"):
        tune(G, photos, anchors, [{"params": [torch.nn.Parameter(torch.zeros(1))]}], steps=30,
             checkpoint=tmp_path / "run.ckpt", progress=False)  # fmt: skip
    (tmp_path / "run.ckpt").write_bytes(b"broken")
    with pytest.raises(FileError, match="no readable checkpoint"):
        run(100, tmp_path / "run.ckpt")


def test_tune_refuses_anchors_of_other_photos(found):
    G, photos, anchors = found
    with pytest.raises(ConvloraError, match="not of the same files"):
        tune(G, photos.first(2), anchors, [], steps=1)


def test_full_fine_tuning_leaves_only_the_mapping_frozen():
    G = tiny_generator()
    mapping = sum(p.numel() for p in G.backbone.mapping.parameters())
    assert sum(p.numel() for p in unfreeze(G)) == sum(p.numel() for p in G.parameters()) - mapping


@pytest.mark.parametrize(
    ("preset", "rank", "trainables"),
    [
        ("true_rank", 1, 91_110 + 4_257),
        ("paper", 1, 240_030),
        ("official_code", 1, 243_965),
        ("paper", 4, 897_552),
        ("paper", 16, 3_527_640),
    ],
)
def test_trainables_on_the_full_configuration(preset, rank, trainables):
    with torch.device("meta"):
        G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"])
    assert sum(p.numel() for p in G.parameters()) == 30_662_136
    assert inject_personal(G, rank, preset).num_trainable == trainables


@pytest.mark.parametrize(("rank_per", "values"), [("matrix", 91_110), ("kernel", 219_174)])
def test_lora_on_backbone_and_superresolution_of_the_full_configuration(rank_per, values):
    with torch.device("meta"):
        G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"])
    adapter = convlora.inject_lora(G, targets=list(TARGETS), rank_per=rank_per)
    assert (len(adapter.layers), adapter.num_parameters) == (52, values)


def test_ranks_above_three_are_capped_on_rgb_layers_only():
    adapter = inject_personal(tiny_generator(), rank=4)
    ranks = {name: change.A.shape[0] for name, change in adapter.layers.items()}
    assert {name for name, rank in ranks.items() if rank != 4} == {
        "superresolution.block0.torgb", "superresolution.block1.torgb"}  # fmt: skip


def test_the_paper_preset_adds_to_affines_outside_their_gain():
    """y = FC(x) + x·Aᵀ·Bᵀ, as My3DGen's wrapper computes it."""
    G = tiny_generator()
    adapter = inject_personal(G, preset="paper")
    layer = G.backbone.synthesis.b8.conv0.affine
    x = torch.randn(3, 8)
    y = layer(x)
    state = adapter.state_dict()
    with torch.no_grad():
        for p in adapter.layers["backbone.synthesis.b8.conv0.affine"].parameters():
            p.normal_()
    A, B = (state[f"backbone.synthesis.b8.conv0.affine/{t}"] for t in "AB")
    torch.testing.assert_close(layer(x), y + x @ A.T @ B.T, rtol=1e-4, atol=1e-5)


def test_unknown_preset():
    with pytest.raises(ConvloraError, match="'fancy'"):
        inject_personal(tiny_generator(), preset="fancy")


def test_novel_views_and_interpolation_share_planes_and_agree_with_synthesis(found):
    G, _, anchors = found
    labels = cameras.random_views(3, seed=4)
    views = novel_views(G, anchors.w[:2], labels, batch_size=2)
    assert views.shape == (2, 3, 3, 128, 128)
    ws = anchors.w[1:2, None].expand(-1, G.num_ws, -1)
    one = G.synthesis(ws, labels[2:3], noise_mode="const", deterministic=True)["image"]
    torch.testing.assert_close(views[1, 2], one[0], rtol=1e-4, atol=1e-4)
    line = interpolate(G, anchors.w[0], anchors.w[1], labels[:1], weights=5)
    assert line.shape == (5, 1, 3, 128, 128)
    torch.testing.assert_close(line[0], views[0, :1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(line[-1], views[1, :1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConvloraError, match="views need w"):
        novel_views(G, anchors.w[0], labels)


def test_id_sim_is_the_brute_force_maximum_and_one_for_a_known_photo():
    a, b = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (5, 7))
    brute = torch.tensor([max(float(x @ y) for y in b) for x in a])
    torch.testing.assert_close(id_sim(a, b), brute)
    torch.testing.assert_close(id_sim(a, torch.cat([b, a])), torch.ones(5))
    with pytest.raises(ConvloraError, match="at least one reference"):
        id_sim(a, b[:0])


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(a, a + 0.2), torch.full((2,), 20.0))
    with pytest.raises(ConvloraError, match="one shape"):
        psnr(a, a[:1])


@pytest.mark.slow
def test_three_steps_of_the_full_size_generator_lower_its_loss():
    """Random weights, one photo, CPU: a minute or two on two cores, 5 GB."""
    torch.manual_seed(0)
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"]).eval().requires_grad_(False)
    photos = Photos(torch.zeros(1, 3, 512, 512), cameras.frontal(1), ["one.png"])
    anchors = Anchors(torch.randn(1, G.w_dim), photos.names, torch.zeros(1))

    def absolute(a, b):
        return (a - b).abs().mean((1, 2, 3))

    def loss():
        with torch.no_grad():
            torch.manual_seed(7)
            return float(photo_loss(reconstruct(G, anchors.w, photos.labels), photos.images, absolute))

    before = loss()
    personalize(G, photos, anchors, steps=3, lr=0.001, batch_size=1, perceptual=absolute, progress=False)
    after = loss()
    print(f"full-size EG3D, loss before and after three steps: {before:.4f} -> {after:.4f}")
    assert after < before
