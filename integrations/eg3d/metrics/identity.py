"""Identity similarity: how much a generated face is one of a person's own photos (My3DGen, equation 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convlora.errors import ConvloraError

#: images (N, 3, R, R) in [-1, 1] -> unit vectors (N, D). ArcFace for photographs, the lab's own for its heads.
IdentityEncoder = Callable[[Tensor], Tensor]


def id_sim(generated: Tensor, reference: Tensor, top: int = 1) -> Tensor:
    """(M,): for each generated embedding (M, D) the mean of its `top` largest cosines with reference embeddings (K, D).

    My3DGen's is top=1, the largest. The reference is every photo of the person outside the test set. The maximum
    grows with K, so scores against references of different size are not comparable: compare with as many photos
    (`subset`), or with top > 1, which depends on K less.

    Raises:
        ConvloraError: embeddings of different width, no reference, or `top` outside 1 to K.
    """
    if generated.shape[-1] != reference.shape[-1] or not len(reference):
        shapes = f"{tuple(generated.shape)} and {tuple(reference.shape)}"
        raise ConvloraError(f"id_sim needs embeddings of one width and at least one reference, got {shapes}")
    if not 1 <= top <= len(reference):
        raise ConvloraError(f"top={top}: there are {len(reference)} reference embeddings; choose from 1 to that")
    return (generated @ reference.T).topk(top, dim=1).values.mean(1)


def subset(reference: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` of the reference embeddings (K, D), drawn without replacement, the same for a seed.

    Raises:
        ConvloraError: there are fewer.
    """
    if not 1 <= count <= len(reference):
        raise ConvloraError(f"a reference of {count} cannot be drawn from {len(reference)} embeddings")
    return reference[torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))[:count]]


def identity_consistency(embeddings: Tensor) -> Tensor:
    """(N,): the mean cosine between different views of one head, of embeddings (N, V, D), V ≥ 2."""
    if embeddings.ndim != 3 or embeddings.shape[1] < 2:
        raise ConvloraError(f"consistency needs embeddings (N, V, D) of V ≥ 2 views, not {tuple(embeddings.shape)}")
    views = embeddings.shape[1]
    cosines = embeddings @ embeddings.mT
    return (cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)) / (views * (views - 1))
