"""The convolution layout of microsoft/LoRA (loralib), kept to read its files and to show what it does.

A `(r·k, in·k)` and B `(out/groups·k, r·k)`; their product, of as many values as the weight, is *viewed* as
`(out, in/groups, k, k)` without regard to what its rows and columns mean. For groups = 1,
ΔW[o, i, u, v] = s·B[o·k + ⌊(i·k + u)/in⌋] · A[:, ((i·k + u) mod in)·k + v]
so the same kernel slices recur in channels in/k apart and output rows are chosen by the input channel: the stripes
("checkerboard") of My3DGen's figure 11 - https://arxiv.org/abs/2307.05468. "Rank r" means up to r·k² as an im2col
matrix. On linear layers and 1×1 convolutions it is plain LoRA. For anything but comparison use "lora".

What differs here: `relative` is LoRA's. s = alpha/r, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.methods.change import Change, check_whole
from convlora.methods.lora import scaling


class LoralibView(Change):
    scale: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        alpha: float | None = None,
        relative: bool = True,
        groups: int = 1,
    ) -> None:
        """Args:
        groups: of the convolutions, which the weight's shape does not tell.
        """
        super().__init__()
        check_whole("groups", groups, 1)
        self.shape = tuple(shape) or tuple(w0.shape)
        out, inputs, k = square(self.shape)
        if out % groups:
            raise ConvloraError(f"groups={groups} does not divide the {out} rows of a weight of shape {self.shape}")
        self.register_buffer("scale", scaling(w0, rank, alpha, relative))
        columns = inputs * groups * k
        A = self.scale.new_empty(rank * k, columns).uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns))
        self.A, self.B = nn.Parameter(A), nn.Parameter(self.scale.new_zeros(out // groups * k, rank * k))

    @classmethod
    def rank_limit(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> int:
        groups = max(1, options.get("groups", 1))
        return max(1, min(shape[0] // groups, shape[1] * groups))

    def delta(self, w0: Tensor) -> Tensor:
        return self.scale * (self.B @ self.A).reshape(w0.shape)


def square(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """`(out, in, k)` of a weight `(out, in)` or `(out, in, k, k)`."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if len(shape) == 4 and shape[2] == shape[3]:
        return shape[0], shape[1], shape[2]
    raise ConvloraError(
        f"this layout is defined for linear layers and square 2-D kernels, not for a weight of shape {list(shape)}: "
        'leave such layers out with exclude=, or use method "lora"'
    )
