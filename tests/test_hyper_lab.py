"""The lab's hypernetwork: what it is taught with is what it says, and its training runs and resumes."""

from __future__ import annotations

import json

import pytest
import torch

from convlora.integrations.eg3d import cameras, lab, load_generator
from convlora.integrations.eg3d.hyper.examples import shown
from convlora.integrations.eg3d.lab import train_hyper, world
from convlora.integrations.eg3d.lab.hyper import encoder, shipped
from convlora.integrations.eg3d.lab.truth import true_views
from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.networks import lab_networks


def test_moments_are_a_persons_own_and_nobody_of_them_is_measured_on() -> None:
    at = train_hyper.moments([300_000, 300_001, 300_002])
    again = train_hyper.moments([300_002])
    assert all(torch.equal(a[2:], b) for a, b in zip(at, again))
    lasting = torch.tensor([name in lab.PEOPLE.lasting_traits for name in world.TRAIT_NAMES])
    assert bool((at.traits[:, ~lasting] == 0).all()) and bool(at.traits.ne(0).any())
    assert train_hyper.TRAINING_SEED + 100_000 < 800_000 < train_hyper.VALIDATION_SEED < lab.EVAL_SEEDS - 10_000
    plain = (train_hyper.moments(list(range(300_000, 300_200))).traits == 0).all(1).float().mean()
    assert 0.1 < float(plain) < 0.3  # those who are left plain, and those to whom nothing rare came


def test_an_example_is_the_photo_the_other_view_and_what_the_prior_makes_of_it(tmp_path) -> None:
    G = load_generator("lab").requires_grad_(False)
    chunk = train_hyper.make_chunk(G, [300_000, 300_003], 0, 1, lab_networks())
    at = train_hyper.moments([300_000, 300_003])
    truth = true_views(at.params[:1], at.traits[:1], at.turned_labels[:1], 128, 64)
    assert chunk.turned is not None
    assert float((shown(chunk.turned[:1]) - truth.images[0]).abs().max()) <= 1 / 127
    # the latent is that of the head without its traits
    poses = cameras.split_label(at.labels)[0]
    plain = world.render(at.params, None, poses, None, 128)
    assert float(psnr(shown(chunk.drawn), plain.image).min()) > 20
    train_hyper.write_chunk(tmp_path / "people.safetensors", chunk)
    again = train_hyper.read_chunk(tmp_path / "people.safetensors")
    assert again.names == chunk.names == ["300000", "300003"]
    assert torch.equal(again.images, chunk.images) and torch.equal(again.w, chunk.w)


def test_the_labs_encoder_sees_photo_rendering_and_difference() -> None:
    see = encoder()
    photo, other = (torch.rand(2, 3, 128, 128) * 2 - 1 for _ in range(2))
    tokens = see(torch.cat([photo, photo - other], 1))
    factors = see.identity.factors.out_features
    local, overall, patches = tokens.split([192, 2 * factors, 48], -1)
    _, of_photo = see.identity.describe(torch.nn.functional.adaptive_avg_pool2d(photo, 64))
    assert torch.allclose(overall[:, 0, :factors], of_photo, atol=1e-4) and torch.equal(overall[:, 0], overall[:, 63])
    swapped = see(torch.cat([other, other - photo], 1))
    assert torch.allclose(swapped[..., :96], local[..., 96:], atol=1e-3)
    # the first token's patch is the upper left eighth
    corner = torch.nn.functional.adaptive_avg_pool2d((photo - other)[..., :16, :16], 4)
    assert torch.allclose(patches[:, 0], 2 * corner.flatten(1), atol=1e-5)


@pytest.mark.skipif(not shipped().is_file(), reason="the lab ships no hypernetwork yet")
def test_the_shipped_one_helps_people_it_has_not_met() -> None:
    """Its provenance says by how much, in the same units as here; four novel views of one person are no proof."""
    told = json.loads(shipped().with_suffix(".json").read_text())
    assert told["hypernetwork_only"]["ID_sim"] > told["pretrained"]["ID_sim"] and told["ID_sim_gain"]["low"] > 0
    assert shipped().stat().st_size < 10 * 2**20
    assert told["procedural"] and told["license"] == "Apache-2.0"


@pytest.mark.slow
def test_training_runs_resumes_and_says_what_it_found(tmp_path, monkeypatch) -> None:
    arguments = [
        "--folder", str(tmp_path / "run"), "--people", "16", "--inverted", "0.125", "--inversion-steps", "1",
        "--taught", "4", "--taught-steps", "2", "--steps", "3", "--batch-size", "2",
        "--export", str(tmp_path / "out.safetensors"),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["train_hyper", *arguments])
    train_hyper.main()
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert (
        facts["pretrained"].keys() == facts["hypernetwork_only"].keys() == {"ID_sim", "identity", "perceptual", "own"}
    )
    helps = facts["ID_sim_gain"]["low"] > 0
    assert (tmp_path / "out.safetensors").is_file() == (tmp_path / "out.json").is_file() == helps
    train_hyper.main()
    again = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert again["hypernetwork_only"] == facts["hypernetwork_only"]
