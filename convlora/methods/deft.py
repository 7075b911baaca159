"""DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models - https://arxiv.org/abs/2509.22793.

W' = (I − QQᵀ)W₀ + Q·R: PaRa's projection with a trainable R `(r, cols)` put in place of what it removes. R starts at
QᵀW₀, so the start is the identity; both B (Q is the orthonormal factor of B `(out, r)`) and R train.

What differs here: R is kept as D = R − Q₀ᵀW₀, its distance from the start, and ΔW = Q·(D + (Q₀ − Q)ᵀW₀). That is the
same function of B and R with the same gradients. But both brackets are zero at the start to the last bit on every
device and in every precision, where Q·(R − QᵀW₀) with a stored R is so only where R was computed. (Training Q·D alone
would also start at zero, but then B gets no gradient, nothing is ever projected away, and it is a LoRA.) Q₀ comes from
the seeded frames of `convlora.methods.lidb`, so that a file holds B and D only, as much as LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convlora.methods.change import LowRankChange, check_whole, factor_dtype
from convlora.methods.lidb import frame
from convlora.methods.para import orthonormal, retract, without_autocast


class DEFT(LowRankChange):
    B0: Tensor
    steps: Tensor

    def __init__(
        self, w0: Tensor, rank: int, *, shape: tuple[int, ...] = (), retract: int = 100, seed: int = 0
    ) -> None:
        """Args:
        retract: calls of `Adapter.step()` between two retractions B ← Q, which keep Q and so the function; 0: never.
        seed: of Q₀.
        """
        super().__init__()
        check_whole("retract", retract, 0)
        check_whole("seed", seed, 0)
        self.retract = retract
        dtype, (out, cols) = factor_dtype(w0), w0.shape
        self.register_buffer("B0", torch.tensor(frame(seed, 0, out, rank), dtype=dtype, device=w0.device), False)
        self.B = nn.Parameter(self.B0.clone())
        self.D = nn.Parameter(torch.zeros(rank, cols, dtype=dtype, device=w0.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=w0.device))

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(w0):
            Q = orthonormal(self.B)
            return Q, self.D + (orthonormal(self.B0) - Q).mT @ w0.to(Q.dtype)

    @staticmethod
    def after_step(changes: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for change in changes.values():
                change.steps += 1
                retract(change)
