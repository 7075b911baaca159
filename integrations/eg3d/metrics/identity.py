"""Identity similarity: how much a generated face is one of a person's own photos (My3DGen, equation 2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from convlora.errors import ConvloraError

#: images (N, 3, R, R) in [-1, 1] -> unit vectors (N, D). ArcFace for photographs, the lab's own for its heads.
IdentityEncoder = Callable[[Tensor], Tensor]


def id_sim(generated: Tensor, reference: Tensor) -> Tensor:
    """(M,): for each generated embedding (M, D) the largest cosine with the reference embeddings (K, D).

    The reference is every photo of the person outside the test set. The maximum grows with K, so scores against
    references of different size are not comparable.
    """
    if generated.shape[-1] != reference.shape[-1] or not len(reference):
        shapes = f"{tuple(generated.shape)} and {tuple(reference.shape)}"
        raise ConvloraError(f"id_sim needs embeddings of one width and at least one reference, got {shapes}")
    return (generated @ reference.T).amax(1)
