"""Three ways to draw over a picture: flat cartoon shades, grey pencil, a printer's few inks.

Each maps images (N, 3, R, R) in [-1, 1] to images of the same shape and range, the same way every time and for every
picture alone, at any R: lengths are shares of R, so that 64² and 512² get the same drawing. They are made to be learnt
by a generator and to be told apart by a perceptual distance; nothing here is trained.

Contours are an extended difference of Gaussians: Winnemöller, Kyprianidis, Olsen, "XDoG: an eXtended
difference-of-Gaussians compendium including advanced image stylization", Computers & Graphics 36, 2012, equations 5
to 7. Smoothing that keeps edges is the guided filter: He, Sun, Tang, "Guided image filtering", ECCV 2010.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError

#: A style: images (N, 3, R, R) in [-1, 1] to such images.
Style = Callable[[Tensor], Tensor]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_FLAT = 0.05  # a standard deviation within a window below which a surface counts as flat
_INK = (0.10, 0.08, 0.12)  # of contours, RGB in [0, 1]
_PAPER, _PENCIL = (0.97, 0.955, 0.92), (0.17, 0.17, 0.19)
#: Night blue, plum, brick, sienna, ochre, skin, cream, teal and slate, as a poster would be printed with.
PALETTE = (
    (0.09, 0.10, 0.22), (0.33, 0.13, 0.30), (0.66, 0.22, 0.18), (0.50, 0.30, 0.18), (0.90, 0.62, 0.24),
    (0.93, 0.71, 0.55), (0.98, 0.93, 0.80), (0.15, 0.50, 0.50), (0.42, 0.50, 0.66),
)  # fmt: skip


def cartoon(images: Tensor) -> Tensor:
    """Flat, saturated shades inside dark contours."""
    rgb = _rgb(images)
    flat = _guided(_guided(rgb))
    luma = _luma(flat)
    colour = flat - luma
    shades = _steps(luma, 6) + 1.35 * colour
    return _image(_over(shades, _contours(rgb), _INK))


def sketch(images: Tensor) -> Tensor:
    """Grey pencil on paper: contours, tone from light strokes, hatching where it is dark."""
    luma = _luma(_rgb(images))
    dodge = (luma / (_blur(luma, 0.035) + 0.02)).clamp(0, 1)  # what is darker than its surroundings
    tone = 0.5 * dodge.square() + 0.5 * (0.45 + 0.55 * _blur(luma, 0.006))
    side = images.shape[-1]
    at = (torch.arange(side, device=images.device, dtype=images.dtype) + 0.5) / side
    rising, falling = (at[:, None] + at) * 32, (at[:, None] - at) * 32  # strokes a 32nd of the picture apart
    for stroke, below in ((rising, 0.36), (falling, 0.22)):
        line = 0.5 + 0.5 * torch.cos(2 * math.pi * stroke)
        depth = torch.sigmoid((below - _blur(luma, 0.015)) * 25)
        tone = tone * (1 - 0.25 * line * depth)
    drawn = 1 - (1 - tone) * 0.9
    pencil = torch.maximum(1 - drawn, 0.85 * _contours(luma.expand(-1, 3, -1, -1)))
    return _image(_over(_colour(_PAPER, images), pencil, _PENCIL))


def palette(images: Tensor) -> Tensor:
    """The nearest of nine inks everywhere, mixed only along the borders."""
    flat = _guided(_rgb(images))
    inks = images.new_tensor(PALETTE)
    lumas = inks @ inks.new_tensor(_LUMA)
    # colours count, but lightness counts more: it is what a face is read from
    apart = (flat[:, None] - inks[None, :, :, None, None]).square().sum(2)
    apart = apart + 2 * (_luma(flat) - lumas[None, :, None, None]).square()
    share = torch.softmax(-apart / 0.004, 1)
    return _image(torch.einsum("nkhw,kc->nchw", share, inks))


#: By name.
STYLES: dict[str, Style] = {"cartoon": cartoon, "sketch": sketch, "palette": palette}


def style_named(name: str) -> Style:
    """The style of this name.

    Raises:
        ConvloraError: there is none.
    """
    if name not in STYLES:
        raise ConvloraError(f"the lab has no style {name!r}; choose one of {', '.join(STYLES)}")
    return STYLES[name]


# ---------------------------------------------------------------------------------------------------------- the parts


def _rgb(images: Tensor) -> Tensor:
    """Images (N, 3, R, R) in [-1, 1] as RGB in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or not images.is_floating_point():
        raise ConvloraError(
            f"a style draws over images (N, 3, R, R) of floating-point numbers in [-1, 1], not {tuple(images.shape)} "
            f"of {images.dtype}"
        )
    return (images.clamp(-1, 1) + 1) / 2


def _image(rgb: Tensor) -> Tensor:
    return rgb.clamp(0, 1) * 2 - 1


def _luma(rgb: Tensor) -> Tensor:
    """(N, 1, R, R)"""
    return (rgb * rgb.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)


def _colour(rgb: tuple[float, float, float], like: Tensor) -> Tensor:
    return like.new_tensor(rgb)[:, None, None].expand_as(like)


def _over(below: Tensor, cover: Tensor, ink: tuple[float, float, float]) -> Tensor:
    """Ink laid over a picture, where cover (N, 1, R, R) in [0, 1] says how thickly."""
    return below * (1 - cover) + _colour(ink, below) * cover


def _steps(values: Tensor, count: int) -> Tensor:
    """Values in [0, 1] brought near the middles of `count` equal steps, with soft borders between them."""
    scaled = values * count
    below = torch.floor(scaled - 0.5)  # a border lies between two middles, at the whole numbers
    rise = torch.sigmoid((scaled - 0.5 - below - 0.5) * 14)
    return ((below + 0.5 + rise) / count).clamp(0, 1)


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur whose standard deviation is a share of R; borders repeat."""
    deviation = max(sigma * images.shape[-1], 1e-3)
    reach = max(1, math.ceil(3 * deviation))
    at = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (at / deviation).square())
    return _separable(images, kernel / kernel.sum())


def _box(images: Tensor, radius: int) -> Tensor:
    """The mean over (2·radius + 1)² pixels; borders repeat."""
    return _separable(images, images.new_full((2 * radius + 1,), 1 / (2 * radius + 1)))


def _separable(images: Tensor, kernel: Tensor) -> Tensor:
    reach, (N, C, H, W) = len(kernel) // 2, images.shape
    planes = images.reshape(N * C, 1, H, W)
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0), "replicate"), kernel[None, None, None])
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach), "replicate"), kernel[None, None, :, None])
    return planes.view(N, C, H, W)


def _guided(rgb: Tensor) -> Tensor:
    """Smoothed, but not across edges: within a window every channel is a linear function of itself."""
    radius = max(1, round(0.02 * rgb.shape[-1]))
    mean = _box(rgb, radius)
    variance = (_box(rgb.square(), radius) - mean.square()).clamp_min(0)
    slope = variance / (variance + _FLAT**2)
    return _box(slope, radius) * rgb + _box(mean - slope * mean, radius)


def _contours(rgb: Tensor) -> Tensor:
    """(N, 1, R, R) in [0, 1]: how much of a pixel a contour covers, from the channel that changes most."""
    fine, coarse = _blur(rgb, 0.007), _blur(rgb, 0.013)
    difference = (fine - coarse).amin(1, keepdim=True)  # negative on the darker side of an edge
    return torch.sigmoid((-difference - 0.022) / 0.005)
