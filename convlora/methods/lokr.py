"""LoKr, LyCORIS's Kronecker product - https://arxiv.org/abs/2309.14859, section 3; the idea is KronA's, 2212.10650.

ΔW = s·(w1 ⊗ w2) with out = o1·o2, in = i1·i2, w1 `(o1, i1)` and w2 `(o2, i2·positions)`, each in full or as a product
of factors of rank r (w1_a·w1_b, w2_a·w2_b). w2 is in full where r is no saving, 2r ≥ max(o2, i2), and w1 unless
`decompose_both`. s = alpha/r, once, if any is a product, else 1. The w2 side starts at zero: the identity.

What differs here: on im2col matrices the Kronecker product of convolution kernels is the plain one of matrices, so
there is one expression for training and merging; the scale of the start and `relative` are LoRA's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.methods.change import Change
from convlora.methods.lora import scaling


class LoKr(Change):
    scale: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        alpha: float | None = None,
        relative: bool = True,
        factor: int = -1,
        decompose_both: bool = False,
    ) -> None:
        """Args:
        factor: o1 and i1 are the largest divisors of out and in that are not above it (nor above their square root);
            -1: as near to the square root as can be.
        decompose_both: w1, too, becomes a product of factors where that saves values.
        """
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
            raise ConvloraError(f"factor must be a whole number of at least 1, or -1, not {factor!r}")
        out, cols = w0.shape
        inputs = shape[1] if len(shape) > 1 else cols
        (o1, o2), (i1, i2) = split(out, factor), split(inputs, factor)
        product1 = decompose_both and 2 * rank < max(o1, i1)
        product2 = 2 * rank < max(o2, i2)
        self.register_buffer("scale", scaling(w0, rank, alpha if product1 or product2 else None, relative))
        like, right = self.scale, i2 * (cols // inputs)
        std = 1 / math.sqrt(3 * cols)
        if product1:
            self.w1_a = nn.Parameter(like.new_empty(o1, rank).normal_(std=1 / math.sqrt(rank)))
            self.w1_b = nn.Parameter(like.new_empty(rank, i1).normal_(std=std))
        else:
            self.w1 = nn.Parameter(like.new_empty(o1, i1).normal_(std=std))
        if product2:
            self.w2_a = nn.Parameter(like.new_zeros(o2, rank))
            self.w2_b = nn.Parameter(like.new_empty(rank, right).normal_())
        else:
            self.w2 = nn.Parameter(like.new_zeros(o2, right))

    def delta(self, w0: Tensor) -> Tensor:
        w1 = self.w1 if hasattr(self, "w1") else self.w1_a @ self.w1_b
        w2 = self.w2 if hasattr(self, "w2") else self.w2_a @ self.w2_b
        return self.scale * torch.kron(w1, w2)


def split(size: int, factor: int) -> tuple[int, int]:
    """`(small, large)` with small·large = size; the same as LyCORIS's, so that its files fit."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return small, size // small
