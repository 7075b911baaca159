"""LoRA: Low-Rank Adaptation of Large Language Models - https://arxiv.org/abs/2106.09685, equation 3.

ΔW = s·B·A with B `(out, r)` starting at zero and A `(r, cols)` Kaiming-uniform, so the start is the identity.

What differs here: s = alpha/rank, times the weight's own scale when `relative` is on. A's usual range
±1/√cols is matched to weights initialised by `nn.Conv2d` (root mean square 1/√(3·cols)). Weights of
equalised-learning-rate networks have root mean square 1, against which the same A is about 118 times too
small for a 512-channel 3×3 layer. `relative` multiplies s by rms(W₀)·√(3·cols), so that rank, alpha and
learning rate mean the same on every layer; a layer as `nn.Conv2d` initialises it gets a factor of about 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from convlora.methods.change import LowRankChange, factor_dtype


class LoRA(LowRankChange):
    scale: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        alpha: float | None = None,
        relative: bool = True,
        inner: int | None = None,
    ) -> None:
        """`inner` is the factors' inner size where it differs from the nominal rank (`rank_per="kernel"`)."""
        super().__init__()
        out, cols = w0.shape
        inner = inner or rank
        dtype = factor_dtype(w0)
        self.A = nn.Parameter(torch.empty(inner, cols, dtype=dtype, device=w0.device))
        self.B = nn.Parameter(torch.zeros(out, inner, dtype=dtype, device=w0.device))
        nn.init.uniform_(self.A, -1 / math.sqrt(cols), 1 / math.sqrt(cols))  # Kaiming-uniform with a = √5
        scale = torch.full((), (rank if alpha is None else alpha) / rank, dtype=dtype, device=w0.device)
        if relative:
            rms = w0.detach().to(dtype).square().mean().sqrt()
            scale = scale * torch.where(rms > 0, rms * math.sqrt(3 * cols), torch.ones_like(rms))
        # In the state dict, so that an averaged (EMA) or resumed model keeps the scale it was trained with.
        self.register_buffer("scale", scale)

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        return self.B, self.scale * self.A

    def extra_repr(self) -> str:
        return f"out={self.B.shape[0]}, cols={self.A.shape[1]}, rank={self.A.shape[0]}"
