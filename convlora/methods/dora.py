"""DoRA: Weight-Decomposed Low-Rank Adaptation - https://arxiv.org/abs/2402.09353, equation 5.

W' = m·V/‖V‖ with V = W₀ + s·B·A: a trainable magnitude m per output channel times the direction of a LoRA.

What differs here: the gradient goes through ‖V‖. The paper proposes to treat the norm as a constant (equation 11), and
PEFT does; that saves memory and is not the gradient of the loss. `axis="in"` takes a norm per input channel, over
outputs and kernel positions, as older kohya files do. m is compared with its own start: W' = (m − m₀ + ‖W₀‖)·V/‖V‖,
which is the same number, but 1·W₀ to the last bit at the start on every device. A channel with V = 0 keeps W' = V, not
0/0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.methods.change import Change, factor_dtype
from convlora.methods.lora import scaling, start

AXES = {"out": (1, 2), "in": (0, 2)}  # dimensions that the norm sums over, of the weight as (out, in, positions)


class DoRA(Change):
    scale: Tensor
    magnitude0: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        alpha: float | None = None,
        relative: bool = True,
        rslora: bool = False,
        axis: str = "out",
        inner: int | None = None,
    ) -> None:
        """`alpha`, `relative`, `rslora` and `inner` are LoRA's.

        Args:
        axis: "out", one magnitude per row of the weight's first dimension, or "in", one per entry of its second.
        """
        super().__init__()
        if axis not in AXES:
            raise ConvloraError(f'axis must be "out" or "in", not {axis!r}')
        self.sums = AXES[axis]
        self.cube = (w0.shape[0], shape[1] if len(shape) > 1 else w0.shape[1], -1)
        self.register_buffer("scale", scaling(w0, rank, alpha, relative, rslora))
        down, up = start(w0, inner or rank, "kaiming", self.scale)
        self.A, self.B = nn.Parameter(down), nn.Parameter(up)
        norm = self.norm(w0.detach().to(factor_dtype(w0)).reshape(self.cube)).flatten()
        self.magnitude = nn.Parameter(norm)
        self.register_buffer("magnitude0", norm.clone(), persistent=False)

    def norm(self, cube: Tensor) -> Tensor:
        """Norms over all but the axis, kept as dimensions of size 1; their gradient at zero is zero."""
        square = cube.square().sum(self.sums, keepdim=True)
        return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)

    def delta(self, w0: Tensor) -> Tensor:
        base = w0.to(self.A.dtype).reshape(self.cube)
        V = base + self.scale * (self.B @ self.A).view(self.cube)
        norm = self.norm(V)
        magnitude = (self.magnitude - self.magnitude0).view_as(norm) + self.norm(base)
        ratio = torch.where(norm > 0, magnitude / torch.where(norm > 0, norm, 1), 1)
        return (ratio * V - base).reshape(w0.shape)
