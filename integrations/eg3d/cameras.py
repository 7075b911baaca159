"""Cameras of EG3D: look-at poses, intrinsics, the 25-number label.

Camera frame: OpenCV (x right, y down, z forward). World frame: y up, a face looks to +z, x to the viewer's right.
A label is 16 numbers of cam2world, row by row, and 9 of the intrinsics, normalised by the image size.
Source: Chan et al., "Efficient Geometry-aware 3D Generative Adversarial Networks", https://arxiv.org/abs/2112.07945.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError

RADIUS = 2.7
FOCAL = 4.2647  # 2985.29 / 700: the focal length of every FFHQ label
FFHQ_INTRINSICS = ((FOCAL, 0.0, 0.5), (0.0, FOCAL, 0.5), (0.0, 0.0, 1.0))

Angle = float | Tensor


def ffhq_intrinsics(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """FFHQ_INTRINSICS as a (3, 3) tensor."""
    return torch.tensor(FFHQ_INTRINSICS, device=device, dtype=dtype)


def fov_to_intrinsics(fov_degrees: float, device: torch.device | str | None = None) -> Tensor:
    """(3, 3) intrinsics as EG3D's scripts compute them: 1.414 makes 18.837 degrees 4.2634, a diagonal-like angle."""
    focal = 1 / (math.tan(fov_degrees * 3.14159 / 360) * 1.414)
    return torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]], device=device)


def create_cam2world(forward: Tensor, origin: Tensor) -> Tensor:
    """(N, 4, 4) poses that look along `forward` (N, 3) from `origin` (N, 3), with the world's y up."""
    forward = F.normalize(forward, dim=-1)
    up = torch.zeros_like(forward)
    up[..., 1] = 1
    right = -F.normalize(torch.linalg.cross(up, forward), dim=-1)
    down = F.normalize(torch.linalg.cross(forward, right), dim=-1)
    top = torch.stack([right, down, forward, origin], dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], dim=-2)


def look_at(
    h: Angle,
    v: Angle,
    pivot: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
    radius: Angle = RADIUS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(N, 4, 4) cameras on the sphere of `radius` around the origin that look at `pivot`.

    h, v, radius: numbers or (N,) tensors; pivot (3,) or (N, 3). pi/2 in both angles is frontal, larger h moves the
    camera to +x, smaller v up. v is not a polar angle: cos(polar) = 1 - 2 v / pi, so dv tilts by about 2 dv / pi
    near the equator (`vertical_angle` converts). The origin does not move with the pivot, as in EG3D.
    """
    given = [a for a in (h, v, radius, pivot) if isinstance(a, Tensor)]
    device = given[0].device if device is None and given else device
    dtype = (given[0].dtype if given else torch.float32) if dtype is None else dtype
    angles = [torch.as_tensor(a, device=device, dtype=dtype).reshape(-1) for a in (h, v, radius)]
    horizontal, vertical, distance = torch.broadcast_tensors(*angles)
    phi = torch.arccos(1 - 2 * vertical.clamp(1e-5, math.pi - 1e-5) / math.pi)
    theta = math.pi - horizontal
    origin = distance[:, None] * torch.stack([phi.sin() * theta.cos(), phi.cos(), phi.sin() * theta.sin()], dim=-1)
    target = torch.as_tensor(pivot, device=device, dtype=dtype)
    return create_cam2world(target - origin, origin)


def vertical_angle(elevation: Angle) -> Angle:
    """The v of `look_at` for a camera raised by `elevation` radians above the horizon."""
    sine = elevation.sin() if isinstance(elevation, Tensor) else math.sin(elevation)
    return (1 - sine) * math.pi / 2


def label(cam2world: Tensor, intrinsics: Tensor | None = None) -> Tensor:
    """(N, 25) labels from cam2world (N, 4, 4) or (4, 4) and intrinsics (3, 3) or (N, 3, 3); None = FFHQ's."""
    if cam2world.shape[-2:] != (4, 4):
        raise ConvloraError(f"cam2world must have shape (N, 4, 4), got {tuple(cam2world.shape)}")
    cam2world = cam2world.reshape(-1, 16)
    if intrinsics is None:
        intrinsics = ffhq_intrinsics(cam2world.device, cam2world.dtype)
    if intrinsics.shape[-2:] != (3, 3):
        raise ConvloraError(f"intrinsics must have shape (3, 3) or (N, 3, 3), got {tuple(intrinsics.shape)}")
    intrinsics = intrinsics.to(cam2world).reshape(-1, 9).expand(len(cam2world), 9)
    return torch.cat([cam2world, intrinsics], dim=1)


def split_label(c: Tensor) -> tuple[Tensor, Tensor]:
    """cam2world (N, 4, 4) and intrinsics (N, 3, 3) of labels c (N, 25)."""
    if c.ndim != 2 or c.shape[1] != 25:
        raise ConvloraError(f"camera labels have shape (N, 25), got {tuple(c.shape)}")
    return c[:, :16].reshape(-1, 4, 4), c[:, 16:].reshape(-1, 3, 3)


def frontal(
    n: int = 1,
    pivot: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
    radius: float = RADIUS,
    device: torch.device | str | None = None,
) -> Tensor:
    """(n, 25) frontal labels: the usual conditioning pose."""
    return label(look_at(math.pi / 2, math.pi / 2, pivot, radius, device=device)).repeat(n, 1)


def turned(yaws: Tensor, pivot: Sequence[float] | Tensor = (0.0, 0.0, 0.0), radius: float = RADIUS) -> Tensor:
    """(N, 25) labels at eye height, turned by yaws (N,) radians from the frontal view, to +x where positive."""
    return label(look_at(math.pi / 2 + yaws, math.pi / 2, pivot, radius))


def orbit_of(rendering_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The `pivot` and `radius` of a generator's usual cameras, as keywords of `frontal`, `look_at`, `random_views`."""
    return {
        "pivot": rendering_kwargs.get("avg_camera_pivot", (0.0, 0.0, 0.0)),
        "radius": rendering_kwargs.get("avg_camera_radius", RADIUS),
    }


def random_views(
    n: int,
    yaw: float = 0.35,
    pitch: float = 0.25,
    mode: str = "uniform",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    pivot: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
    radius: float = RADIUS,
    intrinsics: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(n, 25) labels around the frontal view: 'uniform' in +-yaw, +-pitch, or 'orbit', one closed ellipse.

    yaw and pitch are offsets of h and v in radians, as EG3D's scripts count them. Draws come from `generator`, or
    from a new one with `seed`, on the CPU: the same views on every device.
    """
    if mode not in ("uniform", "orbit"):
        raise ConvloraError(f"mode is {mode!r}; one of uniform, orbit")
    if mode == "orbit":
        turn = torch.arange(n, dtype=torch.float32) * (2 * math.pi / max(n, 1))
        offsets = torch.stack([turn.sin(), turn.cos()])
    else:
        if generator is None and seed is not None:
            generator = torch.Generator().manual_seed(seed)
        offsets = torch.rand(2, n, generator=generator) * 2 - 1
    h = math.pi / 2 + yaw * offsets[0]
    v = math.pi / 2 + pitch * offsets[1]
    if isinstance(pivot, Tensor):
        pivot = pivot.to("cpu", torch.float32)
    return label(look_at(h, v, pivot, radius), intrinsics if intrinsics is None else intrinsics.cpu()).to(device)
