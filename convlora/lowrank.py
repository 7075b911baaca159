"""Linear algebra on a matrix that is known as a product `left @ right`, without multiplying it out.

With `left (out, r)` and `right (r, cols)`, norms and inner products cost O((out + cols)·r²) through the r × r Gram
matrices, and the singular value decomposition O((out + cols)·r²) through two QR decompositions and one of an r × r
matrix, where the product itself has out·cols values and its decomposition costs O(out²·cols).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from convlora.methods.change import Change, LowRankChange, factor_dtype, settled


class Factors(NamedTuple):
    """The matrix `left @ right`."""

    left: Tensor  # (out, r)
    right: Tensor  # (r, cols)

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.right.shape[0]


#: ΔW of one layer, `(out, cols)`: as factors where its method knows them, dense otherwise.
Update: TypeAlias = "Factors | Tensor"


class SVD(NamedTuple):
    """`U (out, k)`, singular values `S (k)` from the largest down, `V (k, cols)` with orthonormal rows."""

    U: Tensor
    S: Tensor
    V: Tensor


@torch.no_grad()
def update_of(change: Change, w0: Tensor) -> Update:
    """A change's ΔW at its present strength and without dropout, in the precision of its trainables."""
    dtype = factor_dtype(w0)
    with settled(change):
        if isinstance(change, LowRankChange):
            left, right = change.factors(w0)
            return Factors((change.strength * left).to(dtype), right.to(dtype))
        return (change.strength * change.delta(w0)).to(dtype)


def scaled(update: Update, weight: float) -> Update:
    return Factors(weight * update.left, update.right) if isinstance(update, Factors) else weight * update


def dense(update: Update) -> Tensor:
    return update.left @ update.right if isinstance(update, Factors) else update


def wide(update: Update) -> Update:
    """In float64 where the device has it, for sums of squares of small differences."""
    if isinstance(update, Factors):
        return Factors(_wide(update.left), _wide(update.right))
    return _wide(update)


def total(updates: Sequence[Update]) -> Update:
    """The exact sum: the factors side by side while that takes less than the matrix's full rank, dense otherwise."""
    factored = [update for update in updates if isinstance(update, Factors)]
    if len(factored) == len(updates) and sum(f.rank for f in factored) <= min(factored[0].shape):
        return Factors(torch.cat([f.left for f in factored], 1), torch.cat([f.right for f in factored]))
    return torch.stack([dense(update) for update in updates]).sum(0)


def as_factors(update: Update) -> Factors:
    """Exact factors of any update; those of a dense one are an identity and the matrix itself."""
    if isinstance(update, Factors):
        return update
    out, cols = update.shape
    eye = torch.eye(min(out, cols), dtype=update.dtype, device=update.device)
    return Factors(eye, update) if out <= cols else Factors(update, eye)


def svd(update: Update) -> SVD:
    """The thin singular value decomposition; of factors, by QR of each and the decomposition of the small core."""
    if isinstance(update, Factors):
        Q_left, R_left = torch.linalg.qr(update.left)
        Q_right, R_right = torch.linalg.qr(update.right.mT)
        U, S, V = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
        return SVD(Q_left @ U, S, V @ Q_right.mT)
    return SVD(*torch.linalg.svd(update, full_matrices=False))


def numerical_rank(decomposition: SVD) -> int:
    """How many singular values stand above the rounding of the decomposition itself."""
    U, S, V = decomposition
    if not len(S) or not S[0] > 0:
        return 0
    return int((S > S[0] * max(U.shape[0], V.shape[1]) * torch.finfo(S.dtype).eps).sum())


def truncated(decomposition: SVD, rank: int) -> tuple[Factors, float]:
    """The nearest matrix of this rank, as balanced factors, and its Frobenius distance (Eckart and Young, 1936)."""
    U, S, V = decomposition
    root = S[:rank].sqrt()
    return Factors(U[:, :rank] * root, root[:, None] * V[:rank]), float(_wide(S[rank:]).norm())


def inner(a: Update, b: Update) -> float:
    """The Frobenius inner product ⟨a, b⟩; of factors, tr((b.leftᵀ a.left)(a.right b.rightᵀ))."""
    a, b = wide(a), wide(b)
    if isinstance(a, Factors) and isinstance(b, Factors):
        return float(((b.left.mT @ a.left) * (b.right @ a.right.mT)).sum())
    if isinstance(b, Factors):
        a, b = b, a
    if isinstance(a, Factors):
        return float((a.left * (dense(b) @ a.right.mT)).sum())
    return float((a * dense(b)).sum())


def norm(update: Update) -> float:
    """The Frobenius norm."""
    return max(inner(update, update), 0.0) ** 0.5


def rows_of(update: Update, values: int = 1 << 20) -> Iterator[Tensor]:
    """The matrix in pieces of whole rows, each of about `values` values: for what no factors can tell."""
    out, cols = update.shape
    step = max(1, values // max(cols, 1))
    for first in range(0, out, step):
        rows = slice(first, first + step)
        yield update.left[rows] @ update.right if isinstance(update, Factors) else update[rows]


def column_space(update: Update) -> Tensor:
    """Orthonormal columns `(out, k)` that span the matrix's column space, k its numerical rank."""
    decomposition = svd(update)
    return decomposition.U[:, : numerical_rank(decomposition)]


def row_space(update: Update) -> Tensor:
    """Orthonormal columns `(cols, k)` that span the matrix's row space, k its numerical rank."""
    decomposition = svd(update)
    return decomposition.V[: numerical_rank(decomposition)].mT


def union(bases: Sequence[Tensor], tolerance: float) -> Tensor:
    """Orthonormal columns that span all bases `(n, r_i)` together, each with orthonormal columns.

    A direction counts once its singular value in the bases side by side is above `tolerance`. Two directions at a
    small angle θ have θ/√2 there: at 1e-5, which rounding in float32 stays below, they are one if θ < 0.001°.
    """
    U, S, _ = torch.linalg.svd(torch.cat(list(bases), 1), full_matrices=False)
    return U[:, S > tolerance]


def principal_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of two orthonormal bases, largest first."""
    return torch.linalg.svdvals(a.mT @ b).clamp(0, 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
