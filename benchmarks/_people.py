"""A generator and one person's photos for it: the lab's, files, or random ones of a released size."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.networks import lab_networks
from convlora.integrations.eg3d.pipeline import Networks


def people_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generator", default="lab", help='"lab" (default), or a generator\'s file or folder')
    parser.add_argument(
        "--config", choices=eg3d.CONFIGS, help="random weights of this size, and random photos, instead"
    )
    parser.add_argument("--album", help="a folder of photos (default: the lab's person A, drawn for it)")


def generator(options: argparse.Namespace) -> eg3d.TriPlaneGenerator:
    if options.config is None:
        return eg3d.load_generator(options.generator, options.device).requires_grad_(False)
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS[options.config])
    return G.eval().requires_grad_(False).to(options.device)


def photos(options: argparse.Namespace, G: eg3d.TriPlaneGenerator, count: int) -> Photos:
    """The first `count` of the album, or fewer where it has fewer; the lab's, for other generators, are enlarged."""
    side = G.img_resolution
    if options.config is not None:
        labels = cameras.random_views(count, seed=0, **cameras.orbit_of(G.rendering_kwargs))
        images = torch.rand(count, 3, side, side) * 2 - 1
        return Photos(images, labels, [f"{i:03}.png" for i in range(count)])
    if options.album is not None:
        return eg3d.load_album(options.album, side).train.first(count)
    with tempfile.TemporaryDirectory() as folder:
        path = eg3d.lab.write_album(eg3d.lab.PERSON_A, Path(folder) / "album", count, 0, side)
        return eg3d.load_album(path, side).train


def networks(options: argparse.Namespace) -> Networks:
    """The lab's encoder and perceptual distance for the lab's own generator; none for others."""
    return lab_networks(options.device) if options.generator == "lab" and options.config is None else Networks()
