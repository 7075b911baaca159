"""What spoils a photo: holes and lost resolution, as differentiable operators on images (N, 3, R, R) in [-1, 1]."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.tasks.blend import gaussian_blur

#: "area": the mean of each cell, as MyStyle; "bicubic": with antialiasing; "blur": a Gaussian, then every k-th pixel.
Downsampling = Literal["area", "bicubic", "blur"]


def downsample(images: Tensor, factor: int, how: Downsampling = "area") -> Tensor:
    """(N, 3, R/factor, R/factor). My3DGen's super-resolution undoes area averaging by 16, from 512 to 32."""
    check_downsampling(how)
    side = images.shape[-1]
    if factor < 1 or side % factor:
        raise ConvloraError(f"factor={factor} does not divide the {side} pixels of a side")
    if how == "area":
        return F.avg_pool2d(images, factor)
    if how == "bicubic":
        return F.interpolate(images, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return gaussian_blur(images, factor / 2)[..., factor // 2 :: factor, factor // 2 :: factor]


def check_downsampling(how: str) -> None:
    """Raise `ConvloraError` if there is no such way to make images small."""
    if how not in get_args(Downsampling):
        raise ConvloraError(f"how is one of {', '.join(get_args(Downsampling))}, not {how!r}")


def center_hole(resolution: int, share: float = 0.4) -> Tensor:
    """A mask (1, 1, R, R), 1 = known, with a square hole of `share` of the side in the middle, where faces are."""
    if not 0 < share < 1:
        raise ConvloraError(f"share={share}: the hole's side is a share of the picture's, between 0 and 1")
    mask = torch.ones(1, 1, resolution, resolution)
    edge = round(resolution * (1 - share) / 2)
    if 2 * edge >= resolution or edge == 0:
        raise ConvloraError(f"share={share} of {resolution} pixels leaves no hole, or nothing around it")
    mask[..., edge : resolution - edge, edge : resolution - edge] = 0
    return mask


def free_form_hole(resolution: int, seed: int = 0, strokes: int = 6, width: float = 0.08) -> Tensor:
    """A mask (1, 1, R, R), 1 = known, with holes along random brush strokes, `width` of the side wide."""
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.arange(resolution) + 0.5) / resolution
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    mask = torch.ones(resolution, resolution)
    for _ in range(strokes):
        place = 0.2 + 0.6 * torch.rand(2, generator=generator)
        heading = float(torch.rand((), generator=generator)) * 2 * math.pi
        for _ in range(12):
            heading += float(torch.randn((), generator=generator)) * 0.5
            mask[(x - place[0]).square() + (y - place[1]).square() < (width / 2) ** 2] = 0
            place = place + width / 2.5 * torch.tensor([math.cos(heading), math.sin(heading)])
    return mask[None, None]
