"""Structural similarity: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity"."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError

SIDE, SIGMA = 11, 1.5  # of the paper's Gaussian window
_C1, _C2 = 0.01**2, 0.03**2  # K₁, K₂ of the paper, for values in [0, 1]


def ssim(a: Tensor, b: Tensor, padding: Literal["valid", "same"] = "valid") -> Tensor:
    """Structural similarity (N,) of images (N, 3, R, R) in [-1, 1], clamped to that range: 1 for equal ones.

    Under an 11×11 Gaussian window (σ = 1.5), with population covariances, on [0, 1], averaged over colours.
    `padding="valid"` averages over positions where the window fits, as the paper and scikit-image do; "same" pads
    with zeros, as several PyTorch versions do, and gives other numbers: say which was used.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ConvloraError(
            f"ssim compares images (N, 3, R, R) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if padding not in ("valid", "same"):
        raise ConvloraError(f'padding must be "valid" or "same", not {padding!r}')
    if min(a.shape[-2:]) < SIDE:
        raise ConvloraError(f"ssim's window is {SIDE}×{SIDE}, the images are {a.shape[-2]}×{a.shape[-1]}: too small")
    x, y = (a.clamp(-1, 1) + 1) / 2, (b.clamp(-1, 1) + 1) / 2
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]), padding)
    var_x, var_y, covariance = xx - mean_x.square(), yy - mean_y.square(), xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    return (luminance * (2 * covariance + _C2) / (var_x + var_y + _C2)).mean((1, 2, 3))


def _blur(x: Tensor, padding: str) -> Tensor:
    """Every channel of (K, N, C, H, W) under the window, one axis after the other."""
    at = torch.arange(SIDE, device=x.device, dtype=x.dtype) - SIDE // 2
    window = torch.exp(-at.square() / (2 * SIGMA**2))
    window = window / window.sum()
    flat = x.flatten(0, 2)[:, None]
    pad = SIDE // 2 if padding == "same" else 0
    flat = F.conv2d(flat, window.view(1, 1, -1, 1), padding=(pad, 0))
    flat = F.conv2d(flat, window.view(1, 1, 1, -1), padding=(0, pad))
    return flat.view(*x.shape[:3], *flat.shape[-2:])
