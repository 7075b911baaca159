"""Joining a generated picture and a photo: the photo where it is known, the generator elsewhere."""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError

#: "paste": the photo wherever the mask knows it. "feather": the same with a soft seam in the photo. "laplacian": every
#: band of frequencies with a seam of its own width (Burt and Adelson 1983). "poisson": the generator's gradients with
#: the photo's colours at the seam (Pérez et al. 2003), as MyStyle does.
Blend = Literal["paste", "feather", "laplacian", "poisson"]


def blend(generated: Tensor, photo: Tensor, known: Tensor, how: Blend = "feather", width: float = 8.0) -> Tensor:
    """(N, 3, R, R): photo where `known` (N or 1, 1, R, R) is 1, generated where it is 0.

    `width` is that of the seam in pixels, which lies in the known region ("feather"; "poisson" solves for a hole
    this much larger); unused by the others.
    """
    check_blend(how)
    known = check_mask(known, photo).to(photo)
    generated = generated.to(photo)
    photo = torch.where(known > 0, photo, generated)  # whatever the hole holds, NaN included, is not looked at
    if how == "laplacian":
        return _laplacian(generated, photo, known)
    if how == "poisson":
        hole = (F.max_pool2d(1 - known, *_window(width)) > 0.5).expand(len(photo), -1, -1, -1)
        return torch.stack([_poisson(g, p, h[0]) for g, p, h in zip(generated, photo, hole)])
    if how == "feather":
        hole = 1 - known
        known = 1 - torch.maximum(hole, gaussian_blur(F.max_pool2d(hole, *_window(width)), width / 2))
    return torch.lerp(generated, photo, known)


def check_blend(how: str) -> None:
    """Raise `ConvloraError` if there is no such way to blend, or what it needs is not installed."""
    if how not in get_args(Blend):
        raise ConvloraError(f"blend is one of {', '.join(get_args(Blend))}, not {how!r}")
    if how == "poisson" and importlib.util.find_spec("scipy") is None:
        raise ConvloraError('blend="poisson" needs SciPy: pip install "convlora[eg3d]"')


def check_mask(mask: Tensor, images: Tensor) -> Tensor:
    """The mask if it is (N or 1, 1, R, R) for images (N, 3, R, R) and within [0, 1]; else a ConvloraError."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != images.shape[2:] or len(mask) not in (1, len(images)):
        raise ConvloraError(
            f"the mask has shape {tuple(mask.shape)}; pictures of shape {tuple(images.shape)} need "
            f"({len(images)}, 1, {images.shape[2]}, {images.shape[3]}), 1 = known, 0 = hole"
        )
    low, high = float(mask.min()), float(mask.max())
    if not (0 <= low and high <= 1):
        raise ConvloraError(f"the mask has values from {low:g} to {high:g}; they must lie in [0, 1]")
    return mask


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """(N, C, H, W) blurred with a Gaussian of `sigma` pixels, edges repeated; 0 changes nothing."""
    if sigma <= 0:
        return images
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    taps = torch.exp(-0.5 * (x / sigma) ** 2)
    taps = (taps / taps.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, taps, groups=images.shape[1])
    return F.conv2d(rows, taps.transpose(2, 3), groups=images.shape[1])


def _window(width: float) -> tuple[int, int, int]:
    reach = max(0, round(width))
    return 2 * reach + 1, 1, reach


def _laplacian(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    # The seam is one pixel at the finest level and twice as wide at each coarser one.
    side = min(a.shape[-2:])
    if side < 8:
        return torch.lerp(a, b, mask)
    small_a, small_b, small_mask = (_half(t) for t in (a, b, mask))
    size = a.shape[-2:]
    detail = torch.lerp(a - _double(small_a, size), b - _double(small_b, size), mask)
    return detail + _double(_laplacian(small_a, small_b, small_mask), size)


def _half(images: Tensor) -> Tensor:
    return F.interpolate(gaussian_blur(images, 1.0), scale_factor=0.5, mode="bilinear", align_corners=False)


def _double(images: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(images, tuple(size), mode="bilinear", align_corners=False)


def _poisson(generated: Tensor, photo: Tensor, hole: Tensor) -> Tensor:
    """Solve Δx = Δgenerated in the hole with x = photo around it; at the picture's border the gradient is free."""
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import spsolve

    inside = hole.cpu().numpy()
    count = int(inside.sum())
    if count in (0, inside.size):
        return (generated if count else photo).clone()
    index = np.full(inside.shape, -1)
    index[inside] = np.arange(count)
    guide, around = (t.detach().cpu().double().numpy() for t in (generated, photo))
    degree, right = np.zeros(count), np.zeros((count, 3))
    rows, columns = [], []
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        here = [slice(None), slice(None)]
        there = [slice(None), slice(None)]
        here[axis], there[axis] = (slice(None, -1), slice(1, None)) if step > 0 else (slice(1, None), slice(None, -1))
        own, other = index[tuple(here)], index[tuple(there)]
        of_hole = own >= 0
        i, j = own[of_hole], other[of_hole]
        degree[i] += 1
        right[i] += (guide[(slice(None), *here)][:, of_hole] - guide[(slice(None), *there)][:, of_hole]).T
        rows.append(i[j >= 0])
        columns.append(j[j >= 0])
        right[i[j < 0]] += around[(slice(None), *there)][:, of_hole][:, j < 0].T
    links = csr_matrix((-np.ones(sum(map(len, rows))), (np.concatenate(rows), np.concatenate(columns))), (count, count))
    solved = spsolve((diags(degree) + links).tocsc(), right).reshape(count, 3)
    out = photo.clone()
    out[:, hole] = torch.from_numpy(solved.T.copy()).to(out)
    return out
