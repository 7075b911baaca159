"""The loss of My3DGen, equation 1, and what it compares with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.generator import TriPlaneGenerator

#: A perceptual distance: images (N, 3, R, R) in [-1, 1], twice, to (N,). LPIPS' own modules fit.
Perceptual = Callable[[Tensor, Tensor], Tensor]


def reconstruct(G: TriPlaneGenerator, w: Tensor, labels: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """Render w (N, w_dim), the same for every layer, at labels (N, 25), with the checkpoint's constant noise."""
    ws = w[:, None].expand(-1, G.num_ws, -1)
    return G.synthesis(ws, labels, noise_mode="const", **kwargs)  # type: ignore[arg-type]


def photo_loss(out: dict[str, Tensor], target: Tensor, perceptual: Perceptual | None, weight: float = 1.0) -> Tensor:
    """(N,): Σ over image_raw and image of MSE + weight·perceptual; the target is resized to image_raw's side."""
    total = torch.zeros(len(target), device=target.device)
    for image in (out["image_raw"], out["image"]):
        truth = resize(target, image.shape[-1])
        total = total + (image - truth).square().mean((1, 2, 3))
        if perceptual is not None:
            total = total + weight * perceptual(image, truth).flatten()
    return total
