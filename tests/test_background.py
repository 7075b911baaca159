"""Backgrounds and the masks for them."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import tiny_generator

from convlora.errors import ConvloraError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras, lab
from convlora.integrations.eg3d.tasks.background import nearer_than, opacity, replace_background


def test_person_and_background_come_from_their_pictures() -> None:
    images, backgrounds = torch.ones(2, 3, 32, 32), -torch.ones(2, 3, 32, 32)
    person = torch.zeros(1, 1, 32, 32)
    person[..., 8:24, 8:24] = 1
    hard = replace_background(images, backgrounds, person, feather=0)
    assert torch.equal(hard, (2 * person - 1).expand(2, 3, -1, -1))
    soft = replace_background(images, backgrounds, person, feather=2)
    assert float(soft[0, 0, 16, 16]) > 0.99 and float(soft[0, 0, 0, 0]) < -0.99
    assert float(soft.diff(dim=-1).abs().max()) < 0.6


@pytest.mark.parametrize(
    ("backgrounds", "person", "message"),
    [((2, 3, 16, 16), (1, 1, 32, 32), "one shape"), ((2, 3, 32, 32), (1, 1, 16, 16), "mask has shape")],
)
def test_wrong_shapes_are_named(backgrounds, person, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        replace_background(torch.zeros(2, 3, 32, 32), torch.zeros(backgrounds), torch.ones(person))


@pytest.mark.parametrize("at_once", [20, 128**2])
def test_opacity_is_that_of_the_rays(monkeypatch, at_once) -> None:
    monkeypatch.setattr(sys.modules[opacity.__module__], "_RAYS", at_once)
    G = tiny_generator()
    ws = G.mapping(torch.randn(2, 8), cameras.frontal(2))
    found = opacity(G, ws, cameras.frontal(2), 8)
    assert found.shape == (2, 1, 8, 8) and float(found.min()) >= 0 and float(found.max()) <= 1
    rendered = G.render(G.planes(ws, noise_mode="const"), cameras.frontal(2), 8, deterministic=True)
    assert torch.allclose(found.flatten(), rendered.weight_sum.flatten().clamp(0, 1))


def test_depth_finds_the_head_that_the_lab_drew() -> None:
    # The prior's own depth, held against the true outline of the same head.
    G = eg3d.load_generator("lab").requires_grad_(False)
    params = torch.cat([lab.sample_identity(850_200), torch.zeros(1, len(lab.world.NUISANCE_NAMES))], 1)
    label = cameras.frontal(1)
    w = G.mapping(lab.z_from_params(params), label)
    depth = G.synthesis(w, label, noise_mode="const", deterministic=True)["image_depth"]
    found = nearer_than(depth, label, 0.15, 128)
    truth = lab.render(params, None, cameras.split_label(label)[0], None, 128).mask
    overlap = float((found * truth).sum() / torch.maximum(found, truth).sum())
    assert overlap > 0.8
