"""What a method is: a small piece of mathematics on one layer's matrix.

`w0` is always the frozen weight in its im2col view `(out, cols)`, as `convlora.layers.as_matrix` gives it.
A method knows nothing of layer kinds, models or files. It is a class whose constructor takes
`(w0, rank, *, shape, …options)`: `shape` is the raw weight's own shape `(out, in, *kernel)`, for methods that treat
a kernel's positions or input channels apart, and every further keyword is an option of the method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError


class Change(nn.Module):
    """The change of one weight matrix: `delta(w0)` gives ΔW of w0's shape."""

    #: The rank where the user gives none; None: the largest one allowed.
    default_rank: ClassVar[int | None] = 1
    enabled: bool = True
    strength: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A tensor, not a float: moving a slider must not make torch.compile compile again.
        self.register_buffer("strength", torch.ones(()), persistent=False)

    def delta(self, w0: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define delta(w0)")

    # What follows has a default that suits most methods.

    @classmethod
    def rank_limit(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> int:
        """The largest rank that makes sense on a weight of this shape."""
        return min(shape[0], prod(shape[1:]))

    @classmethod
    def skips(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> bool:
        """Whether the method leaves out layers of this shape."""
        return False

    @staticmethod
    def after_step(changes: Mapping[str, Any]) -> None:
        """Called by `Adapter.step()` with all changes of the adapter, between `optimizer.step()` and `zero_grad()`."""

    def saved(self) -> tuple[dict[str, Tensor], int | None]:
        """The tensors that go to a file, and their rank where it is no longer the one given (0: none go)."""
        return self.state_dict(), None

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


@contextlib.contextmanager
def settled(change: Change) -> Iterator[None]:
    """Inside, the change is what it is outside training: without dropout."""
    training = change.training
    change.eval()
    try:
        yield
    finally:
        change.train(training)


def factor_dtype(w0: Tensor) -> torch.dtype:
    """Trainable factors of a half-precision weight stay in float32: Adam's small steps vanish in 8 or 11 bits."""
    return w0.dtype if w0.dtype in (torch.float32, torch.float64) else torch.float32


def check_whole(name: str, value: object, least: int) -> None:
    """Raise `ConvloraError` unless the option is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConvloraError(f"{name} must be a whole number of at least {least}, not {value!r}")
