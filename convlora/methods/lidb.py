"""LiDB, the Lightweight DreamBooth of HyperDreamBooth - https://arxiv.org/abs/2307.06949, section 4.1.

ΔW = s·A_aux·A_train·B_train·B_aux: the frames A_aux `(out, b)` and B_aux `(a, cols)` are frozen and random, and only
A_train `(b, r)` and B_train `(r, a)` are trained and stored: 150 numbers per layer and rank, whatever its size.

What differs here: the frames are orthonormal (columns of A_aux, rows of B_aux), so ‖ΔW‖ = s·‖A_train·B_train‖ and
distances between codes are distances between weights. They are capped at the matrix: b at out, a at cols. A_train
starts at zero, so the start is the identity and, unlike with both at zero, there is a gradient. `relative` is LoRA's.

The frames are no file's business: they are made again from `seed`, equal to the last bit on every platform. Hence no
BLAS, LAPACK or math library and no random normals, whose bits differ between platforms: raw integers of PCG64 (a stream
that numpy guarantees) give signs and permutations, and Walsh-Hadamard butterflies mix, in float64 additions and
divisions, which IEEE 754 fixes to the last bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convlora.methods.change import LowRankChange, check_whole, factor_dtype
from convlora.methods.lora import scaling


class LiDB(LowRankChange):
    A_aux: Tensor
    B_aux: Tensor
    scale: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        a: int = 100,
        b: int = 50,
        seed: int = 0,
        relative: bool = True,
    ) -> None:
        """Args:
        a, b: size of the frame on the input side and on the output side.
        seed: of the frames; adapters can be compared, mixed and predicted by their codes only under the same one.
        relative: multiply by the weight's own scale, as for LoRA; False: s = 1.
        """
        super().__init__()
        for name, value, least in (("a", a, 1), ("b", b, 1), ("seed", seed, 0)):
            check_whole(name, value, least)
        (out, cols), dtype = w0.shape, factor_dtype(w0)
        b, a = min(b, out), min(a, cols)
        left = torch.tensor(frame(seed, 0, out, b), dtype=dtype, device=w0.device)
        right = torch.tensor(frame(seed, 1, cols, a), dtype=dtype, device=w0.device)
        self.register_buffer("A_aux", left, persistent=False)
        self.register_buffer("B_aux", right.mT.contiguous(), persistent=False)
        self.register_buffer("scale", scaling(w0, rank, None, relative))
        self.A_train = nn.Parameter(torch.zeros(b, rank, dtype=dtype, device=w0.device))
        self.B_train = nn.Parameter(torch.randn(rank, a, dtype=dtype, device=w0.device) / math.sqrt(a))

    @classmethod
    def rank_limit(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> int:
        return max(1, min(options.get("a", 100), options.get("b", 50), super().rank_limit(shape, options)))

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        return self.A_aux @ self.A_train, self.scale * (self.B_train @ self.B_aux)


@functools.lru_cache(maxsize=16)  # the layers of EG3D ask for 15 different ones
def frame(seed: int, stream: int, n: int, k: int) -> NDArray[np.float64]:
    """k ≤ n orthonormal columns `(n, k)`, read-only; every (seed, stream) gives others."""
    random = np.random.PCG64([seed, stream])
    columns = np.eye(n, k)
    power = 1 << (n.bit_length() - 1)  # the largest power of two in n
    # The transform mixes the first rows, then the last ones; where n is a power of two, these are the same. After
    # three rounds the entries look normal.
    for _ in range(3):
        columns = columns[np.argsort(random.random_raw(n), kind="stable")]
        for rows in (slice(0, power), slice(n - power, n)):
            columns *= np.where(random.random_raw(n) >> np.uint64(63), 1.0, -1.0)[:, None]
            butterflies(columns[rows])
    columns.setflags(write=False)
    return columns


def butterflies(rows: NDArray[np.float64]) -> None:
    """The orthonormal Walsh-Hadamard transform over the first axis, whose size is a power of two, in place."""
    half = 1
    while half < len(rows):
        pairs = rows.reshape(-1, 2, half, rows.shape[1])
        first = pairs[:, 0] + pairs[:, 1]
        np.subtract(pairs[:, 0], pairs[:, 1], out=pairs[:, 1])
        pairs[:, 0] = first
        half *= 2
    rows /= math.sqrt(len(rows))
