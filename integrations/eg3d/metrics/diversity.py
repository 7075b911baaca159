"""Diversity of generated faces (Ojha et al., https://arxiv.org/abs/2104.06820, section 4.1; My3DGen, table 2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.metrics.loading import PerceptualDistance


class Diversity(NamedTuple):
    """Perceptual distance between generated images that are nearest to the same photo, over the clusters of two or
    more: the mean and the standard deviation of the clusters' means; `balanced`, their mean weighted by −p·log₁₀p of
    the clusters' shares p (CoLoR-GAN); the number of `clusters`, and how many photos attract fewer than two."""

    mean: float
    std: float
    balanced: float
    clusters: int
    empty: int


@torch.no_grad()
def diversity(
    generated: Tensor,
    photos: Tensor,
    perceptual: PerceptualDistance,
    *,
    keep: int = 50,
    side: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> Diversity:
    """Cluster generated (M, 3, R, R) by their nearest photo (K, 3, R, R), and measure how they differ within.

    Images are reduced to `side` if larger; of a cluster at most `keep`, drawn at random, are compared pair by pair.
    Ojha et al. take LPIPS (vgg), 1,000 images and 256 pixels. With no cluster of two the distances are NaN.
    """
    if not len(generated) or not len(photos):
        raise ConvloraError(f"diversity needs images and photos, got {len(generated)} and {len(photos)}")
    known = _features(photos, perceptual, side, batch_size)
    nearest = []
    for image in generated.split(batch_size):
        mine = perceptual.features(resize(image, min(side, image.shape[-1])))
        rows = []
        for one in range(len(image)):
            repeated = [f[one : one + 1].expand(len(photos), *f.shape[1:]) for f in mine]
            rows.append(perceptual.distance(repeated, known).argmin())
        nearest.append(torch.stack(rows).cpu())
    cluster = torch.cat(nearest)
    generator = torch.Generator().manual_seed(seed)
    means, shares = [], []
    for photo in range(len(photos)):
        members = (cluster == photo).nonzero()[:, 0]
        if len(members) < 2:
            continue
        shares.append(len(members) / len(generated))
        members = members[torch.randperm(len(members), generator=generator)[:keep]]
        features = _features(generated[members], perceptual, side, batch_size)
        pairs = torch.combinations(torch.arange(len(members)))
        distances = [
            perceptual.distance([f[part[:, 0]] for f in features], [f[part[:, 1]] for f in features])
            for part in pairs.split(64)
        ]
        means.append(float(torch.cat(distances).mean()))
    if not means:
        return Diversity(math.nan, math.nan, math.nan, 0, len(photos))
    weights = [-share * math.log10(share) for share in shares]
    total = sum(weights)
    values = torch.tensor(means, dtype=torch.float64)
    balanced = sum(w * m for w, m in zip(weights, means)) / total if total else means[0]
    return Diversity(
        float(values.mean()), float(values.std(correction=0)), balanced, len(means), len(photos) - len(means)
    )


def _features(images: Tensor, perceptual: PerceptualDistance, side: int, batch_size: int) -> list[Tensor]:
    parts = [perceptual.features(resize(part, min(side, part.shape[-1]))) for part in images.split(batch_size)]
    return [torch.cat(stage) for stage in zip(*parts)]
