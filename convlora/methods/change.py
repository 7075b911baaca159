"""What a method is: a small piece of mathematics on one layer's matrix.

`w0` is always the frozen weight in its im2col view `(out, cols)`, as `convlora.layers.as_matrix` gives it.
A method knows nothing of layer kinds, models or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Change(nn.Module):
    """The change of one weight matrix: `delta(w0)` gives ΔW of w0's shape."""

    enabled: bool = True
    strength: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A tensor, not a float: moving a slider must not make torch.compile compile again.
        self.register_buffer("strength", torch.ones(()), persistent=False)

    def delta(self, w0: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define delta(w0)")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # A checkpoint of the plain base model says nothing about adapters: loading it into an adapted model
        # restores the base and leaves the change alone, also with strict=True.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *rest)


class LowRankChange(Change):
    """A change with known factors: `factors(w0)` gives left `(out, r)` and right `(r, cols)`, ΔW = left @ right."""

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define factors(w0)")

    def delta(self, w0: Tensor) -> Tensor:
        left, right = self.factors(w0)
        return left @ right


def factor_dtype(w0: Tensor) -> torch.dtype:
    """Trainable factors of a half-precision weight stay in float32: Adam's small steps vanish in 8 or 11 bits."""
    return w0.dtype if w0.dtype in (torch.float32, torch.float64) else torch.float32
