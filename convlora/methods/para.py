"""PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction - https://arxiv.org/abs/2406.05641.

W' = W₀ − λ·Q(QᵀW₀) with Q `(out, r)` the orthonormal factor of the trainable B = QR: r output directions are removed,
so that QᵀW' = 0 at λ = 1 and rank(W') is at most out − r. λ is `Change.strength` times the warm-up.

What differs here: the projection acts on the im2col matrix of any layer, QQᵀ is never formed, and ΔW has factors
−Q and QᵀW₀. A removal cannot start as the identity, so `warmup` raises λ from 0 to 1. The loss depends on B only
through its column space, so its gradient is orthogonal to B, whose norm can only grow and slow training down:
`retract` resets B to Q every so many steps, which changes the function by rounding only. r < out is enforced (r = out
would erase the layer), and layers with few rows, a 3-channel ToRGB say, are left out by default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.methods.change import LowRankChange, check_whole, factor_dtype

INITS = ("gaussian", "least_energy")


class PaRa(LowRankChange):
    warmth: Tensor
    steps: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        init: str = "gaussian",
        warmup: int = 0,
        retract: int = 100,
        min_out: int = 4,
    ) -> None:
        """Args:
        init: of B: "gaussian" (standard deviation 0.02), or "least_energy", the directions in which W₀ has the least
            output energy ‖qᵀW₀‖, which start with the smallest change.
        warmup: calls of `Adapter.step()` over which λ rises from 0 to 1; 0: it is 1 from the start.
        retract: calls of `Adapter.step()` between two retractions B ← Q; 0: never.
        min_out: layers with fewer rows are left out.
        """
        super().__init__()
        if init not in INITS:
            raise ConvloraError(f"init must be one of {', '.join(INITS)}, not {init!r}")
        check_whole("warmup", warmup, 0)
        check_whole("retract", retract, 0)
        check_whole("min_out", min_out, 0)
        self.warmup, self.retract = warmup, retract
        if init == "gaussian":
            B = 0.02 * torch.randn(w0.shape[0], rank, dtype=factor_dtype(w0), device=w0.device)
        else:
            wide = w0.detach().cpu().double()
            B = torch.linalg.eigh(wide @ wide.mT)[1][:, :rank].to(w0.device, factor_dtype(w0))
        self.B = nn.Parameter(B.contiguous())
        self.register_buffer("warmth", torch.full((), 0.0 if warmup else 1.0, dtype=B.dtype, device=w0.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=w0.device))

    @classmethod
    def rank_limit(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> int:
        return min(shape[0] - 1, super().rank_limit(shape, options))

    @classmethod
    def skips(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> bool:
        return shape[0] < options.get("min_out", 4)

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(w0):
            Q = orthonormal(self.B)
            return -Q, self.warmth * (Q.mT @ w0.to(Q.dtype))

    @staticmethod
    def after_step(changes: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for change in changes.values():
                change.steps += 1
                if change.warmup:
                    change.warmth.copy_((change.steps / change.warmup).clamp(max=1))
                retract(change)


def orthonormal(B: Tensor) -> Tensor:
    """Q of B = QR with R's diagonal positive, `(out, r)`, in float32 at least.

    LAPACK's own signs jump while B moves smoothly; these do not, and an orthonormal B is its own Q.
    """
    Q, R = torch.linalg.qr(B.to(torch.promote_types(B.dtype, torch.float32)))
    return Q * torch.where(R.diagonal() < 0, -1, 1)


def retract(change: Any) -> None:
    """B ← Q if the change's counter `steps` says so, decided on the device: the host need not wait for it."""
    if change.retract:
        Q = orthonormal(change.B).to(change.B.dtype)
        change.B.copy_(torch.where(change.steps % change.retract == 0, Q, change.B))


def without_autocast(w0: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Bfloat16 holds 8 bits: a projection computed with them is none."""
    return contextlib.nullcontext() if w0.is_meta else torch.autocast(w0.device.type, enabled=False)
