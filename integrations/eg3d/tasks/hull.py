"""The personal space: the convex hull of a person's anchors, dilated about their mean (MyStyle, section 3; My3DGen).

P_β = {αᵀW : Σα = 1, α ≥ −β} for anchors W (N, w_dim). It is the convex hull dilated about the mean anchor by
κ = 1 + Nβ, and α = κ·s − β with s on the simplex. κ is what we ask for, since the same β means another dilation
for every N: MyStyle's β = 0.02 at 50 anchors is κ = 2.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError

#: "exact": α = κ·softmax(θ) − β. "mystyle": softplus against −β, then divided by the sum, as MyStyle's code has it,
#: which promises Σα = 1 but α ≥ −β only while the sum before the division stays near 1.
Parametrisation = Literal["exact", "mystyle"]
_SHARPNESS = 100.0  # of MyStyle's softplus
_STILL = 1e-9  # a thousand more such steps would change no coefficient by a millionth


class Hull(NamedTuple):
    """Anchors (N, w_dim) and the dilation κ ≥ 1 (1: the convex hull itself)."""

    anchors: Tensor
    dilation: float = 2.0

    @property
    def beta(self) -> float:
        return (self.dilation - 1) / len(self.anchors)

    def start(self, shape: tuple[int, ...] = (), parametrisation: Parametrisation = "exact") -> Tensor:
        """θ of the mean anchor: N numbers for each item of `shape`."""
        count = len(self.anchors)
        value = 0.0 if parametrisation == "exact" else 1 / count
        return self.anchors.new_full((*shape, count), value)

    def coefficients(self, theta: Tensor, parametrisation: Parametrisation = "exact") -> Tensor:
        """α (..., N) from unconstrained θ (..., N)."""
        if parametrisation == "exact":
            return self.dilation * theta.softmax(-1) - self.beta
        if parametrisation != "mystyle":
            raise ConvloraError(f'the parametrisation is "exact" or "mystyle", not {parametrisation!r}')
        bounded = F.softplus(theta + self.beta, beta=_SHARPNESS) - self.beta
        return bounded / bounded.sum(-1, keepdim=True)

    def w(self, alpha: Tensor) -> Tensor:
        """(..., w_dim): the latents with coefficients α (..., N)."""
        return alpha @ self.anchors

    def project(self, w: Tensor, steps: int = 500) -> Tensor:
        """α (..., N) of the points of the hull next to w (..., w_dim).

        At most `steps` accelerated projected gradients on the simplex, fewer where they no longer move; the problem
        is convex, and its solution in w unique.
        """
        A = self.anchors.double() - self.anchors.double().mean(0)
        target = (w.to(A) - self.anchors.double().mean(0)) / self.dilation
        gram, linear = A @ A.T, target @ A.T
        rate = 1 / torch.linalg.matrix_norm(gram, 2).clamp_min(1e-12)
        s = A.new_full((*w.shape[:-1], len(A)), 1 / len(A))
        ahead, momentum = s, 1.0
        for step in range(steps):
            previous = s
            s = project_to_simplex(ahead - rate * (ahead @ gram - linear))
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = s + (momentum - 1) / following * (s - previous)
            momentum = following
            if step % 50 == 49 and bool((s - previous).abs().max() < _STILL):
                break
        return (self.dilation * s - self.beta).to(w)

    def nearest(self, alpha: Tensor) -> Tensor:
        """The feasible coefficients next to α (..., N), in the Euclidean distance of the coefficients."""
        return self.dilation * project_to_simplex((alpha + self.beta) / self.dilation) - self.beta

    def contains(self, alpha: Tensor, tolerance: float = 1e-5) -> Tensor:
        """(...) whether Σα = 1 and every α ≥ −β."""
        return ((alpha.sum(-1) - 1).abs() <= tolerance) & (alpha.amin(-1) >= -self.beta - tolerance)


def make_hull(anchors: Tensor, dilation: float | None = None, beta: float | None = None) -> Hull:
    """The hull of `anchors` (N, w_dim), with the dilation κ ≥ 1 (default 2), or MyStyle's β ≥ 0 instead."""
    if anchors.ndim != 2 or not len(anchors):
        raise ConvloraError(f"a hull needs anchors of shape (N, w_dim), not {tuple(anchors.shape)}")
    if dilation is not None and beta is not None:
        raise ConvloraError(f"give dilation={dilation} or beta={beta}, not both: dilation = 1 + N·beta")
    if beta is not None:
        dilation = 1 + len(anchors) * beta
    dilation = 2.0 if dilation is None else dilation
    if not 1 <= dilation < float("inf"):
        raise ConvloraError(f"the dilation is {dilation}; 1 is the convex hull itself, larger is wider")
    return Hull(anchors, float(dilation))


def project_to_simplex(x: Tensor) -> Tensor:
    """The points of the simplex {s ≥ 0, Σs = 1} next to x, along the last dimension (Held, Wolfe, Crowder 1974)."""
    ordered = x.sort(-1, descending=True).values
    excess = (ordered.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    kept = (ordered > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, kept - 1)).clamp_min(0)
