"""Tensor layouts of other libraries as factors of the im2col matrix, and back: mathematics only, no models, no files.

Everywhere A is `(r, in/groups·kernel)` and B is `(out, r)`, with ΔW = B·A as an `out × in/groups·kernel` matrix.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from convlora.methods.tucker import contract


def loralib_to_im2col(A: Tensor, B: Tensor, shape: tuple[int, ...], groups: int = 1) -> tuple[Tensor, Tensor]:
    """Factors of rank r·k²·groups for loralib's A `(r·k, in·k)` and B `(out/groups·k, r·k)`.

    loralib reads B·A, row by row, as `(out, in/groups, k, k)`. Cut every row of B·A into `groups` pieces of
    `in/groups·k` values: output o is then made of the k pieces o·k … o·k + k − 1, side by side, and piece n is piece
    n mod groups of row ⌊n/groups⌋. So A's pieces, one copy per position, stand block by block in the new A, and
    the new B picks for every output and position the row of B that it reads.
    """
    out, inputs, k = shape[0], shape[1], prod(shape[2:3])
    width = inputs * k
    pieces = torch.cat(A.split(width, 1))  # (groups·r·k, in/groups·k)
    new_A = torch.block_diag(*[pieces] * k)
    piece = torch.arange(out * k, device=B.device)
    picked = B.new_zeros(out * k, groups, B.shape[1])
    picked[piece, piece % groups] = B[piece // groups]
    return new_A, picked.reshape(out, -1)


def peft_groups_to_im2col(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """Factors for PEFT's grouped convolution: A `(r, in, *kernel)` reads all inputs, B `(out, r/groups)` its group's r.

    None where A reads inputs of other groups: then no change of the layer's own weight computes the same. If all
    groups share their A, as `im2col_to_peft_groups` writes it, the rank is r/groups, else r.
    """
    r, out = A.shape[0], B.shape[0]
    blocks = A.reshape(groups, r // groups, groups, -1)  # (group of B, its rank, group of inputs, in/groups·kernel)
    own = torch.stack([blocks[g, :, g] for g in range(groups)])
    if torch.count_nonzero(own) != torch.count_nonzero(A):
        return None
    if bool((own == own[:1]).all()):
        return own[0], B
    spread = B.new_zeros(groups, out // groups, groups, r // groups)
    for g in range(groups):
        spread[g, :, g] = B.view(groups, out // groups, -1)[g]
    return own.flatten(0, 1), spread.reshape(out, r)


def im2col_to_peft_groups(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """PEFT's A `(groups·r, in·kernel)`, a copy of A on the inputs of every group, and its B `(out, r)`, which is B."""
    r, cols = A.shape
    wide = A.new_zeros(groups, r, groups, cols)
    for g in range(groups):
        wide[g, :, g] = A
    return wide.reshape(groups * r, groups * cols), B


def contract_hadamard(core: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """LyCORIS's Tucker form of one LoHa or LoKr side: core `(r, r, *kernel)`, a `(r, out)`, b `(r, in)`.

    Returns a `(out, r)` and b `(r, in·kernel)`, the core multiplied out.
    """
    return a.T, contract(core, b)
