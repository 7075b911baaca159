"""Novel appearances: random points of the personal space from random cameras (MyStyle section 4.2; My3DGen 4.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.images import save_png
from convlora.integrations.eg3d.tasks.hull import Hull
from convlora.integrations.eg3d.tasks.views import novel_views

#: How weights on the chosen anchors are drawn: MyStyle's normalised uniform numbers, or flat on the simplex.
Weights = Literal["normalized_uniform", "dirichlet"]


class Synthesis(NamedTuple):
    """w (M, w_dim), their coefficients alpha (M, N), cameras labels (M, 25), images (M, 3, R, R) in [-1, 1]."""

    w: Tensor
    alpha: Tensor
    labels: Tensor
    images: Tensor


def sample_alpha(
    hull: Hull,
    count: int,
    *,
    support: int = 3,
    weights: Weights = "normalized_uniform",
    truncation: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """(count, N) coefficients: `support` distinct anchors each, weighted at random, dilated with the hull.

    A flat draw over all of 50 anchors is hardly ever far from their mean (its greatest weight is about 0.09), so
    few anchors at a time show more of the person. `truncation` ψ draws α towards the mean: ψα + (1 − ψ)/N.
    """
    N = len(hull.anchors)
    if not 1 <= support <= N:
        raise ConvloraError(f"support={support}: there are {N} anchors to mix; choose from 1 to {N}")
    if weights not in get_args(Weights):
        raise ConvloraError(f"weights is one of {', '.join(get_args(Weights))}, not {weights!r}")
    if count < 1:
        raise ConvloraError(f"count={count}: at least one sample is needed")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, N, generator=generator).argsort(1)[:, :support]
    drawn = torch.rand(count, support, generator=generator)
    if weights == "dirichlet":
        drawn = -drawn.clamp_min(1e-12).log()  # exponential numbers, normalised, are flat on the simplex
    s = torch.zeros(count, N).scatter_(1, chosen, drawn / drawn.sum(1, keepdim=True))
    alpha = hull.dilation * s - hull.beta
    return (truncation * alpha + (1 - truncation) / N).to(hull.anchors)


def synthesize(
    G: TriPlaneGenerator,
    hull: Hull,
    count: int = 30,
    *,
    support: int = 3,
    weights: Weights = "normalized_uniform",
    truncation: float = 1.0,
    labels: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 8,
    out: str | Path | None = None,
    progress: bool = False,
) -> Synthesis:
    """Draw `count` appearances of a person and render each from one camera.

    Args:
        hull: the person's; dilation 1 stays between anchors, as My3DGen does.
        labels: cameras (count, 25); None: `cameras.random_views` of this seed around the generator's own pivot.
        out: a folder for `0000.png`, …, written as they are made; pictures that are there are not rendered again.
            `images` is then empty, so that a thousand need no memory.

    Raises:
        ConvloraError: count, support or labels that do not fit.
    """
    alpha = sample_alpha(hull, count, support=support, weights=weights, truncation=truncation, seed=seed)
    w = hull.w(alpha)
    if labels is None:
        labels = cameras.random_views(count, seed=seed, **cameras.orbit_of(G.rendering_kwargs))
    if labels.shape != (count, 25):
        raise ConvloraError(f"labels must have shape ({count}, 25), got {tuple(labels.shape)}")
    images = []
    starts = range(0, count, batch_size)
    for first in tqdm(starts, desc="synthesising", disable=not progress):
        rows = range(first, min(first + batch_size, count))
        paths = [Path(out, f"{row:04d}.png") for row in rows] if out is not None else []
        if paths and all(path.is_file() for path in paths):
            continue
        part = slice(rows.start, rows.stop)
        made = novel_views(G, w[part], labels[part, None], batch_size=batch_size)[:, 0]
        for path, image in zip(paths, made):
            save_png(path, image)
        if not paths:
            images.append(made)
    empty = torch.empty(0, 3, G.img_resolution, G.img_resolution)
    return Synthesis(w.cpu(), alpha.cpu(), labels, torch.cat(images) if images else empty)
