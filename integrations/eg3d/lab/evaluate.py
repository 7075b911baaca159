"""Measure the lab's prior: inversion of unseen heads of its own family, where the truth of every view is known.

python -m convlora.integrations.eg3d.lab.evaluate --heads 16 --out out/prior
python -m convlora.integrations.eg3d.lab.evaluate --species cats --heads 8 --out out/cats
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import find_anchors
from convlora.integrations.eg3d.checkpoint import load_generator
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.images import save_sheet
from convlora.integrations.eg3d.lab import networks, world
from convlora.integrations.eg3d.lab._species import SPECIES, Species
from convlora.integrations.eg3d.lab._species import species as species_of
from convlora.integrations.eg3d.lab.encoder import w_encoder
from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.report import Spread
from convlora.integrations.eg3d.tasks import novel_views

UNSEEN = 850_000  # seeds from here are used by no training and by no evaluation of people
YAWS = (-0.35, -0.175, 0.0, 0.175, 0.35)


def measure(
    G: TriPlaneGenerator,
    heads: int = 16,
    steps: int = 100,
    lr: float = 0.02,
    progress: bool = True,
    species: str | Species = "people",
) -> tuple[dict[str, Spread], list[tuple[str, Tensor]]]:
    """Invert one photo of each unseen head, then turn it; returns the figures and the rows of a contact sheet.

    `psnr_head`, `psnr`: the photo against its inversion, over the head and over all pixels. `identity_photo`: cosine
    of the two. `identity_views`, `psnr_views`: the head turned to yaw ±0.35 against the truth from there.
    """
    seeds = range(UNSEEN, UNSEEN + heads)
    params = torch.cat([torch.cat([world.sample_identity(s), world.sample_nuisance(s)], 1) for s in seeds])
    generator = torch.Generator().manual_seed(UNSEEN)
    yaw = 0.2 * torch.randn(heads, generator=generator).clamp(-2, 2)
    pitch = 0.08 * torch.randn(heads, generator=generator).clamp(-2, 2)
    labels = cameras.label(cameras.look_at(math.pi / 2 + yaw, cameras.vertical_angle(pitch)))
    truth = world.render(params, None, cameras.split_label(labels)[0], None, G.img_resolution, species=species)
    photos = Photos(truth.image, labels, [f"head {seed}" for seed in seeds])
    perceptual = partial(networks.perceptual_distance, species=species)
    w = find_anchors(G, photos, steps, init=w_encoder(G, species), perceptual=perceptual, lr=lr, progress=progress).w
    own = novel_views(G, w, labels[:, None])[:, 0]
    turns = cameras.label(cameras.look_at(math.pi / 2 + torch.tensor(YAWS), math.pi / 2))
    views = novel_views(G, w, turns).flatten(0, 1)
    cam2world = cameras.split_label(turns)[0].repeat(heads, 1, 1)
    again = params.repeat_interleave(len(YAWS), 0)
    turned = world.render(again, None, cam2world, None, G.img_resolution, species=species)
    identity = networks.load("identity", species=species)
    with torch.no_grad():
        same = (identity(own) * identity(truth.image)).sum(1)
        same_views = (identity(views) * identity(turned.image)).sum(1).view(heads, -1).mean(1)
    figures = {
        "psnr_head": Spread.of(psnr(own, truth.image, truth.mask)),
        "psnr": Spread.of(psnr(own, truth.image)),
        "identity_photo": Spread.of(same),
        "identity_views": Spread.of(same_views),
        "psnr_views": Spread.of(psnr(views, turned.image, turned.mask).view(heads, -1).mean(1)),
    }
    rows = [("truth", truth.image[:8]), ("inversion", own[:8])]
    for head in range(min(3, heads)):
        part = slice(head * len(YAWS), (head + 1) * len(YAWS))
        rows += [(f"{photos.names[head]}: truth turned", turned.image[part]), ("inversion turned", views[part])]
    return figures, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--species", choices=list(SPECIES), default="people")
    parser.add_argument("--generator", help="default: the species' own")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/prior"))
    options = parser.parse_args()
    G = load_generator(options.generator or species_of(options.species).generator).requires_grad_(False)
    figures, rows = measure(G, options.heads, options.steps, species=options.species)
    sheet = save_sheet(options.out / "sheet.png", rows, scale=1)
    for name, spread in figures.items():
        print(f"{name:16} {spread.mean:7.3f} ± {spread.std:.3f} ({spread.count})")
    plain = {name: [spread.mean, spread.std, spread.count] for name, spread in figures.items()}
    (options.out / "figures.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    print(sheet)


if __name__ == "__main__":
    main()
