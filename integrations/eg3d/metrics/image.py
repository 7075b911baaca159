"""Pixel metrics."""

from __future__ import annotations

from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.losses import masked_mean


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB (N,), of images (N, 3, R, R) in [-1, 1] clamped to that range.

    The peak is 1 on the [0, 1] scale; equal images give +inf. With mask (N, 1, R, R) in [0, 1] the error is the
    mean over its pixels.
    """
    if a.shape != b.shape:
        raise ConvloraError(f"psnr compares images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    squares = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square()
    error = squares.mean((1, 2, 3)) if mask is None else masked_mean(squares, mask)
    return -10 * error.log10()
