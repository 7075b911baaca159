"""Interpolation between two anchors (My3DGen section 4.3): w(θ) = (1 − θ)·w_a + θ·w_b."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.tasks.views import novel_views


def interpolate(
    G: TriPlaneGenerator, w_a: Tensor, w_b: Tensor, labels: Tensor, *, weights: Tensor | int = 10, batch_size: int = 8
) -> Tensor:
    """Render the line from w_a (w_dim,) to w_b from cameras labels (V, 25): (K, V, 3, R, R).

    `weights` is K values of θ, or their number, evenly spaced in [0, 1] with both ends.

    Raises:
        ConvloraError: latents that are not both of this generator, fewer than 2 weights.
    """
    if w_a.shape != (G.w_dim,) or w_b.shape != (G.w_dim,):
        raise ConvloraError(
            f"a line joins two latents of shape ({G.w_dim},) of this generator, not {tuple(w_a.shape)} and "
            f"{tuple(w_b.shape)}"
        )
    if isinstance(weights, int) and weights < 2:
        raise ConvloraError(f"weights={weights}: a line has at least its 2 ends")
    theta = torch.linspace(0, 1, weights) if isinstance(weights, int) else weights
    w = torch.lerp(w_a[None].cpu(), w_b[None].cpu(), theta[:, None].cpu())
    return novel_views(G, w, labels, batch_size=batch_size)
