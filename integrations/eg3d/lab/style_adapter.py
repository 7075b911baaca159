"""An adapter that knows a style and nobody: trained on drawings of many ordinary heads, drawn over in that style.

The head that belongs to a latent z of the lab's prior is z itself, so the latents of drawings are known and no
inversion is needed (docs/lab_provenance.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import convlora
from convlora import Adapter
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.lab import people, world
from convlora.integrations.eg3d.lab._species import Species
from convlora.integrations.eg3d.lab._species import species as species_of
from convlora.integrations.eg3d.lab.styles import style_named
from convlora.integrations.eg3d.losses import Perceptual
from convlora.integrations.eg3d.personalize import TARGETS, narrow, parameter_groups, tune

STYLE_SEEDS = 500_000  # seeds from here are of the heads that styles are learnt from; no other training goes there
_MOST = 0.95  # of a latent's sum of squares may be parameters; see world.z_from_params


class Heads(NamedTuple):
    """Ordinary heads as drawn, images (N, 3, R, R), and the w (N, w_dim) that the prior has for them."""

    photos: Photos
    w: Tensor


def ordinary_heads(
    G: TriPlaneGenerator, count: int, species: str | Species = "people", first: int = STYLE_SEEDS
) -> Heads:
    """One photo each of `count` different individuals without rare traits, from cameras as albums have them.

    Seeds whose numbers fill the latent to the rim (one in two hundred) are passed over.

    Raises:
        ConvloraError: no heads are asked for, seeds reach those of the people that results are measured on, or G has
            a z too short to hold a head.
    """
    kind = species_of(species)
    if count < 1 or first + 2 * count > people.EVAL_SEEDS:
        raise ConvloraError(
            f"count={count} heads from seed {first} on: there must be at least 1, and seeds stay below "
            f"{people.EVAL_SEEDS - 2 * count}, since those from {people.EVAL_SEEDS} on are measured with"
        )
    if G.z_dim <= world.PARAM_DIM:
        raise ConvloraError(f"this generator's z has {G.z_dim} numbers, and a head of the lab has {world.PARAM_DIM}")
    found: list[people.Photos] = []
    names: list[str] = []
    seed = first
    while len(found) < count:
        shot = people.photos(people.Person(str(seed), seed, {}, kind.name), "train", 1, G.img_resolution)
        if float(shot.params.square().sum()) < _MOST * G.z_dim:
            found.append(shot)
            names.append(f"{kind.individual} {seed}")
        seed += 1
    images, labels, params = (torch.cat([getattr(f, part) for f in found]) for part in ("images", "labels", "params"))
    weight = next(G.parameters())
    with torch.no_grad():
        z = world.z_from_params(params, z_dim=G.z_dim).to(weight)
        w = G.mapping(z, labels.to(weight))[:, 0].cpu()
    return Heads(Photos(images, labels, names), w)


def inject_style(
    G: TriPlaneGenerator, rank: int = 4, ranks: Mapping[str, int] | None = None, name: str = "style"
) -> Adapter:
    """A LoRA of true rank `rank` on all layers of `TARGETS`, capped where one has less; `ranks` as `inject_lora`'s.

    The decoder stays the base's, so that `blocks.GROUPS` are all that a style changes, and a person's adapter, which
    trains the decoder, keeps its own.
    """
    return convlora.inject_lora(G, rank, targets=list(TARGETS), ranks={**(ranks or {}), **narrow(G, rank)}, name=name)


def style_adapter(
    G: TriPlaneGenerator,
    style: str,
    *,
    rank: int = 4,
    ranks: Mapping[str, int] | None = None,
    heads: Heads | int = 128,
    steps: int = 120,
    batch_size: int = 4,
    lr: float = 0.004,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    species: str | Species = "people",
    name: str = "style",
) -> Adapter:
    """Teach G a style, in place: heads drawn in it are rendered from the latents of the plain ones; returns the handle.

    `tune` does it, so it goes on from `checkpoint` where it was interrupted.

    Args:
        style: one of `lab.styles.STYLES`.
        ranks: as `convlora.inject_lora`'s; `blocks.masked_ranks(G, ("fine", "sr"))` trains these blocks alone.
        heads: whose drawings, or how many; the same heads serve several styles and masks.
        perceptual: None is MSE alone.

    Raises:
        ConvloraError: no such style, or as `ordinary_heads` and `tune`.
        RankError, TargetError: as `convlora.inject_lora`; G stays as it was.
    """
    draw = style_named(style)
    if isinstance(heads, int):
        heads = ordinary_heads(G, heads, species)
    plain, w = heads
    with torch.no_grad():
        drawn = torch.cat([draw(part) for part in plain.images.split(32)])
    photos = Photos(drawn, plain.labels, plain.names, plain.masks)
    adapter = inject_style(G, rank, ranks, name)
    tune(
        G, photos, Anchors(w, plain.names, torch.zeros(len(w))), parameter_groups(adapter, lr, lr)[:1], steps=steps,
        batch_size=batch_size, perceptual=perceptual, perceptual_weight=perceptual_weight, checkpoint=checkpoint,
        seed=seed, progress=progress, description=f"style {style}",
    )  # fmt: skip
    return adapter
