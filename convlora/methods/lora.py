"""LoRA: Low-Rank Adaptation of Large Language Models - https://arxiv.org/abs/2106.09685, equation 3.

ΔW = s·B·A with B `(out, r)` starting at zero and A `(r, cols)` random, so the start is the identity.

What differs here: s = alpha/rank (alpha/√rank with `rslora`, https://arxiv.org/abs/2312.03732), times the weight's
own scale when `relative` is on. A's usual range ±1/√cols is matched to weights initialised by `nn.Conv2d` (root mean
square 1/√(3·cols)). Weights of equalised-learning-rate networks have root mean square 1, against which the same A is
about 118 times too small for a 512-channel 3×3 layer. `relative` multiplies s by rms(W₀)·√(3·cols), so that rank,
alpha and learning rate mean the same on every layer; a layer as `nn.Conv2d` initialises it gets a factor of about 1.

`init="pissa"` (https://arxiv.org/abs/2404.02948) starts A and B at W₀'s principal part. Its start A₀, B₀ is kept, and
ΔW = s·(B·A − B₀·A₀) = s·((B − B₀)·A + B₀·(A − A₀)) is exactly zero at the start, of rank up to 2r, without touching W₀.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.methods.change import LowRankChange, factor_dtype

INITS = ("kaiming", "gaussian", "orthogonal", "scaled", "pissa")


class LoRA(LowRankChange):
    scale: Tensor
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        alpha: float | None = None,
        relative: bool = True,
        rslora: bool = False,
        dropout: float = 0.0,
        init: str = "kaiming",
        inner: int | None = None,
    ) -> None:
        """Args:
        relative: multiply by the weight's own scale; `init="scaled"` and "pissa" have it in the factors instead.
        dropout: in training, the probability that a column of A (one input of one kernel position) is left out,
            with the others scaled up. PEFT drops activations instead, which has no meaning for a weight.
        init: of A: "kaiming" (uniform), "gaussian" and "orthogonal" of the same root mean square, "scaled"
            (gaussian of W₀'s root mean square), or "pissa".
        inner: the factors' inner size where it differs from the nominal rank (`rank_per="kernel"`).
        """
        super().__init__()
        if init not in INITS:
            raise ConvloraError(f"init must be one of {', '.join(INITS)}, not {init!r}")
        if not 0 <= dropout < 1:
            raise ConvloraError(f"dropout is a probability, 0 ≤ p < 1, not {dropout!r}")
        self.dropout = dropout
        relative = relative and init not in ("scaled", "pissa")
        # In the state dict, so that an averaged (EMA) or resumed model keeps the scale it was trained with.
        self.register_buffer("scale", scaling(w0, rank, alpha, relative, rslora))
        down, up = start(w0, inner or rank, init, self.scale)
        self.A, self.B = nn.Parameter(down), nn.Parameter(up)
        self.register_buffer("A0", down.clone() if init == "pissa" else None)
        self.register_buffer("B0", up.clone() if init == "pissa" else None)

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        left: Tensor = self.B
        right: Tensor = self.A
        if self.A0 is not None and self.B0 is not None:
            left, right = torch.cat([self.B - self.B0, self.B0], 1), torch.cat([self.A, self.A - self.A0])
        right = self.scale * right
        if self.dropout and self.training:
            right = right * F.dropout(torch.ones_like(right[:1]), self.dropout)
        return left, right

    def extra_repr(self) -> str:
        return f"out={self.B.shape[0]}, cols={self.A.shape[1]}, rank={self.A.shape[0]}"


def scaling(w0: Tensor, rank: int, alpha: float | None, relative: bool, rslora: bool = False) -> Tensor:
    """The scalar s of ΔW = s·B·A, in the factors' dtype; alpha None means alpha = rank."""
    alpha = rank if alpha is None else alpha
    scale = torch.full((), alpha / (math.sqrt(rank) if rslora else rank), dtype=factor_dtype(w0), device=w0.device)
    if relative:
        # Row by row: four times as fast as squaring a large matrix, and as exact.
        rows = torch.linalg.vector_norm(w0.detach().to(scale.dtype), dim=1)
        rms = rows.square().mean().sqrt() / math.sqrt(w0.shape[1])
        scale = scale * torch.where(rms > 0, rms * math.sqrt(3 * w0.shape[1]), torch.ones_like(rms))
    return scale


def start(w0: Tensor, inner: int, init: str, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A `(inner, cols)` and B `(out, inner)`; B is zero unless `init` is "pissa"."""
    out, cols = w0.shape
    A = torch.empty(inner, cols, dtype=scale.dtype, device=w0.device)
    B = torch.zeros(out, inner, dtype=scale.dtype, device=w0.device)
    if init == "kaiming":
        nn.init.uniform_(A, -1 / math.sqrt(cols), 1 / math.sqrt(cols))  # Kaiming-uniform with a = √5
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / math.sqrt(3 * cols))
    elif init == "orthogonal":
        nn.init.orthogonal_(A, gain=1 / math.sqrt(3))
    elif init == "scaled":
        nn.init.normal_(A, std=float(w0.detach().float().square().mean().sqrt()) or 1 / math.sqrt(3 * cols))
    else:
        U, S, V = torch.linalg.svd(w0.detach().to(scale.dtype), full_matrices=False)
        root = (S[:inner] / scale).sqrt()
        A, B = root[:, None] * V[:inner], U[:, :inner] * root
        if len(root) < inner:  # rank_per="kernel" may ask for more than the matrix has
            A, B = F.pad(A, (0, 0, 0, inner - len(root))), F.pad(B, (0, inner - len(root)))
    return A, B
