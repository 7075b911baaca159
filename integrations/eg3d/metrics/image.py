"""Pixel metrics."""

from __future__ import annotations

from torch import Tensor

from convlora.errors import ConvloraError


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (N,), of images (N, 3, R, R) in [-1, 1] clamped to that range.

    The peak is 1 on the [0, 1] scale; equal images give +inf.
    """
    if a.shape != b.shape:
        raise ConvloraError(f"psnr compares images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    return -10 * error.log10()
