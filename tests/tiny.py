"""A small EG3D with random weights, and an album of noise: enough to run every stage in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos

TINY = {
    **eg3d.CONFIGS["lab"],
    "z_dim": 8, "w_dim": 8, "plane_resolution": 16, "plane_channels": 4, "decoder_hidden": 8, "feature_channels": 4,
    "channel_base": 64, "channel_max": 8, "neural_rendering_resolution": 16, "sr_kwargs": {"widths": (4, 4)},
}  # fmt: skip
TINY["rendering_kwargs"] = {**TINY["rendering_kwargs"], "depth_resolution": 6, "depth_resolution_importance": 6}
SIDE = TINY["img_resolution"]


def tiny_generator(seed: int = 0) -> eg3d.TriPlaneGenerator:
    torch.manual_seed(seed)
    return eg3d.TriPlaneGenerator(**TINY).eval().requires_grad_(False)


def tiny_photos(count: int, seed: int = 1) -> Photos:
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    ramp = torch.linspace(-0.3, 0.3, SIDE).expand(count, 3, SIDE, SIDE)
    labels = cameras.random_views(count, seed=seed)
    return Photos((colours + ramp).clamp(-1, 1), labels, [f"photo_{i:02d}.png" for i in range(count)])


def write_tiny_album(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    photos = tiny_photos(count)
    pixels = ((photos.images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for name, image in zip(photos.names, pixels):
        Image.fromarray(image).save(folder / name)
    labels = [[name, label] for name, label in zip(photos.names, photos.labels.tolist())]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder
