"""A tensor trained in full: the trainable copy replaces the frozen one, ΔW = value − W₀ (`train=` of `inject`)."""

from __future__ import annotations

from torch import Tensor, nn

from convlora.methods.change import Change, factor_dtype


class Full(Change):
    def __init__(self, tensor: Tensor) -> None:
        """`tensor` has its own shape, of any number of dimensions; only `delta` sees the matrix view."""
        super().__init__()
        self.value = nn.Parameter(tensor.detach().clone().to(factor_dtype(tensor)))

    def delta(self, w0: Tensor) -> Tensor:
        return self.value.reshape(w0.shape) - w0
