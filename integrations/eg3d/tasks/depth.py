"""Depth maps and the normals they imply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.integrations.eg3d.cameras import split_label
from convlora.integrations.eg3d.renderer import sample_rays


def normals(depth: Tensor, labels: Tensor) -> Tensor:
    """Unit normals (N, 3, R, R) in world axes, towards the camera, of depth (N, 1, R, R) seen from labels (N, 25).

    Depth is the distance along the ray, as `synthesis` gives it in image_depth.
    """
    side = depth.shape[-1]
    cam2world, intrinsics = split_label(labels.to(depth))
    origins, directions = sample_rays(cam2world, intrinsics, side)
    points = (origins + directions * depth.flatten(1)[..., None]).transpose(1, 2).unflatten(2, (side, side))
    padded = F.pad(points, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return F.normalize(torch.linalg.cross(down, across, dim=1), dim=1)


def depth_picture(depth: Tensor, near: float | None = None, far: float | None = None) -> Tensor:
    """(N, 3, R, R) in [-1, 1], grey: white at `near`, black at `far`; None: the least and greatest of each map."""
    flat = depth.flatten(1)
    low = flat.amin(1) if near is None else flat.new_full((len(flat),), near)
    high = flat.amax(1) if far is None else flat.new_full((len(flat),), far)
    scaled = (depth - low.view(-1, 1, 1, 1)) / (high - low).clamp_min(1e-6).view(-1, 1, 1, 1)
    return (1 - 2 * scaled.clamp(0, 1)).expand(-1, 3, -1, -1)
