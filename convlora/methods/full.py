"""A tensor trained in full: the trainable copy replaces the frozen one, ΔW = value − W₀.

It is what `train=` of `inject` uses, and a method of its own for layers that are to be tuned without a low rank.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from convlora.methods.change import Change, factor_dtype


class Full(Change):
    default_rank: ClassVar[int | None] = None

    def __init__(self, w0: Tensor, rank: int = 0, *, shape: tuple[int, ...] | None = None) -> None:
        """`w0` may have any number of dimensions here; the value keeps `shape`, or w0's own. `rank` has no meaning."""
        super().__init__()
        value = w0.detach().reshape(w0.shape if shape is None else shape)
        self.value = nn.Parameter(value.clone().to(factor_dtype(w0)))

    def delta(self, w0: Tensor) -> Tensor:
        return self.value.reshape(w0.shape) - w0
