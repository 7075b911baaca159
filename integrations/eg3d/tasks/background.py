"""Backgrounds: the person from one picture, what is behind from another (My3DGen section 4.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.cameras import split_label
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.tasks.blend import check_mask, gaussian_blur

_RAYS = 128**2  # at once: 512² pixels of one picture need 11 GiB otherwise


def replace_background(images: Tensor, backgrounds: Tensor, person: Tensor, feather: float = 3.0) -> Tensor:
    """(N, 3, R, R): images where `person` (N or 1, 1, R, R), 1 = person, and backgrounds elsewhere.

    The mask is blurred by `feather` pixels (standard deviation). For an upscaled photo the background is the small
    photo enlarged, for an inpainted one the photo itself. Masks: `segment`'s, or `nearer_than` of a rendered depth.
    """
    if backgrounds.shape != images.shape:
        raise ConvloraError(
            f"images and backgrounds must have one shape, not {tuple(images.shape)} and {tuple(backgrounds.shape)}"
        )
    person = gaussian_blur(check_mask(person, images).to(images), feather)
    return torch.lerp(backgrounds, images, person)


def nearer_than(depth: Tensor, labels: Tensor, behind: float, resolution: int) -> Tensor:
    """A mask of the head from image_depth (N, 1, r, r): what is nearer than the world's origin plus `behind`.

    EG3D draws its background as a surface too, some way behind the head. Returns (N, 1, resolution, resolution).
    """
    position = split_label(labels)[0][:, :3, 3].to(depth)
    nearer = depth < position.norm(dim=1).view(-1, 1, 1, 1) + behind
    return resize(nearer.to(depth.dtype), resolution).clamp(0, 1)


@torch.no_grad()
def opacity(G: TriPlaneGenerator, ws: Tensor, labels: Tensor, resolution: int | None = None) -> Tensor:
    """How opaque each pixel of ws (N, num_ws, w_dim) from labels (N, 25) is, (N, 1, r, r) in [0, 1].

    With generators whose background is empty (cars: white) this is the object's mask.

    Raises:
        ConvloraError: latents of another generator.
    """
    if ws.shape[1:] != (G.num_ws, G.w_dim):
        raise ConvloraError(f"opacity needs ws (N, {G.num_ws}, {G.w_dim}) of this generator, not {tuple(ws.shape)}")
    side = resolution or G.neural_rendering_resolution
    planes = G.planes(ws, noise_mode="const")
    origins, directions = G.ray_sampler(*split_label(labels.to(planes)), side)
    at_once = max(1, _RAYS // len(ws))
    parts = (
        G.renderer(planes, G.decoder, o, d, G.rendering_kwargs, True).weight_sum
        for o, d in zip(origins.split(at_once, 1), directions.split(at_once, 1))
    )
    return torch.cat(list(parts), 1).transpose(1, 2).unflatten(2, (side, side)).clamp(0, 1)
