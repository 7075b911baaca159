"""LoHa, FedPara's low-rank Hadamard product - https://arxiv.org/abs/2108.06098, proposition 1, as in LyCORIS.

ΔW = s·(w1_a·w1_b) ∘ (w2_a·w2_b) on the im2col matrix, with w?_a `(out, r)` and w?_b `(r, cols)`: rank up to r² from
twice LoRA's values. w2_a starts at zero, so the start is the identity. s = alpha/r, once, merged or not.

What differs here: w1_b starts at the scale of LoRA's A and the other two at 1, so that, with LoRA's `relative`, the
first steps are as long as LoRA's at the same learning rate. LyCORIS starts w1_a at 0.1 and both w?_b at 1.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from convlora.methods.change import Change
from convlora.methods.lora import scaling


class LoHa(Change):
    scale: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        alpha: float | None = None,
        relative: bool = True,
    ) -> None:
        super().__init__()
        out, cols = w0.shape
        self.register_buffer("scale", scaling(w0, rank, alpha, relative))
        like = self.scale
        self.w1_a = nn.Parameter(like.new_empty(out, rank).normal_())
        self.w1_b = nn.Parameter(like.new_empty(rank, cols).normal_(std=1 / math.sqrt(3 * cols)))
        self.w2_a = nn.Parameter(like.new_zeros(out, rank))
        self.w2_b = nn.Parameter(like.new_empty(rank, cols).normal_())

    def delta(self, w0: Tensor) -> Tensor:
        return self.scale * ((self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b))
