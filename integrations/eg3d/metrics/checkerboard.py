"""A number for checkerboards and diagonal stripes: how much of an error sits at the frequencies they have."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.errors import ConvloraError

_FREQUENCIES = (0.25, 0.125)  # cycles per pixel, along the diagonals: half and a quarter of Nyquist
_REACH = 0.03  # of the band around each, cycles per pixel
_FLOOR = 0.05  # slower than this is colour and shape, not pattern


def checkerboard(images: Tensor, targets: Tensor) -> Tensor:
    """(N,) in [0, 1]: the share of the energy of images − targets, both (N, 3, R, R), that a wrong layout prints.

    Of all energy faster than 0.05 cycles per pixel, that within 0.03 of (±f, ±f) for f = 1/4 and 1/8 and of the same
    on the axes. White noise scores about 0.06; a checkerboard of such a period near 1.
    """
    if images.shape != targets.shape or images.ndim != 4 or images.shape[-1] < 32:
        raise ConvloraError(
            f"checkerboard compares images (N, 3, R, R) with R ≥ 32, "
            f"not {tuple(images.shape)} and {tuple(targets.shape)}"
        )
    error = (images - targets).mean(1)
    side = error.shape[-1]
    window = torch.hann_window(side, periodic=False, device=error.device, dtype=error.dtype)
    error = (error - error.mean((1, 2), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(error).abs().square()
    across = torch.fft.fftfreq(side, device=error.device)
    fx, fy = across[None, :].abs(), across[:, None].abs()
    band = torch.zeros(side, side, dtype=torch.bool, device=error.device)
    for f in _FREQUENCIES:
        for at in ((f, f), (f, 0.0), (0.0, f)):
            band |= (fx - at[0]).square() + (fy - at[1]).square() < _REACH**2
    fast = fx.square() + fy.square() > _FLOOR**2
    return (power * (band & fast)).sum((1, 2)) / (power * fast).sum((1, 2)).clamp_min(1e-20)
