"""Tucker-2 LoRA of a convolution, LyCORIS's "LoCon with use_tucker" - https://arxiv.org/abs/2309.14859, section 3.

ΔW[o, i, k] = s·Σ U[o, p]·core[p, q, k]·V[q, i] over p, q ≤ r: reduce the channels to r, convolve r to r, expand. It
has rank r as an im2col matrix, and r·(out + in + r·positions) values where LoRA has r·(out + in·positions). U starts
at zero.

What differs here: layers with one kernel position (1×1 convolutions, linear layers) have no core, which would add
nothing; core and V start so that core·V has the scale of LoRA's A; `relative` is LoRA's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from convlora.methods.change import LowRankChange
from convlora.methods.lora import scaling


class Tucker(LowRankChange):
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
        inputs = shape[1] if len(shape) > 1 else cols
        kernel, positions = tuple(shape[2:]), cols // inputs
        self.register_buffer("scale", scaling(w0, rank, alpha, relative))
        like = self.scale
        self.U = nn.Parameter(like.new_zeros(out, rank))
        self.V = nn.Parameter(like.new_empty(rank, inputs).uniform_(-1, 1) / math.sqrt(inputs))
        self.core = None
        if positions > 1:
            core = like.new_empty(rank, rank, *kernel).normal_(std=1 / math.sqrt(rank * positions))
            self.core = nn.Parameter(core)

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        right: Tensor = self.V
        if self.core is not None:
            right = contract(self.core, self.V)
        return self.U, self.scale * right


def contract(core: Tensor, V: Tensor) -> Tensor:
    """The right factor `(r, in·kernel)`: core `(r, r, *kernel)` times V `(r, in)`."""
    return torch.einsum("pqk,qi->pik", core.flatten(2), V).flatten(1)
