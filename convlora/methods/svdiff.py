"""SVDiff: Compact Parameter Space for Diffusion Fine-Tuning - https://arxiv.org/abs/2303.11305, equation 3.

W' = U·diag(relu(σ + δ))·Vᵀ with W₀ = U·diag(σ)·Vᵀ: only the spectral shifts δ are trained, by default all min(out,
cols) of them; a rank takes the leading ones.

What differs here: the im2col matrix of any layer takes the paper's place of kernels, and ΔW is formed from the
difference of the two spectra, so the start is the identity bit for bit. The slope of relu at 0 is taken as 1, or
singular values of zero (a layer that starts at zero) could never learn. U and V stay out of files and state dicts: they
are computed again from W₀, in float64 on the CPU, so that a file means the same everywhere. They cost as much memory as
the weight, and a large layer takes a second.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from convlora.methods.change import Change, factor_dtype


class SVDiff(Change):
    default_rank: ClassVar[int | None] = None
    U: Tensor
    sigma: Tensor
    V: Tensor

    def __init__(self, w0: Tensor, rank: int, *, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        U, sigma, V = torch.linalg.svd(w0.detach().cpu().double(), full_matrices=False)
        for name, part in (("U", U[:, :rank]), ("sigma", sigma[:rank]), ("V", V[:rank])):
            self.register_buffer(name, part.to(w0.device, factor_dtype(w0)).contiguous(), persistent=False)
        self.shift = nn.Parameter(torch.zeros_like(self.sigma))

    def delta(self, w0: Tensor) -> Tensor:
        return self.U * ((self.sigma + self.shift).clamp(min=0) - self.sigma) @ self.V
