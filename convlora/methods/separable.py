"""A convolution update that is separable in the kernel's two directions; commented out in My3DGen's released code.

With loralib's factors A `(r·k, in·k)` and B `(out·k, r·k)`: ΔW[o, i, u, v] = s·B[o·k + u] · A[:, i·k + v], so rows of
the kernel go with outputs and columns with inputs. Up to rank r·k² as an im2col matrix, with 9(in + out) values on a
3×3 layer at r = 1. It is one of the layouts that My3DGen's figure 11 (https://arxiv.org/abs/2307.05468) is about: next
to `loralib_view` it has its sizes and respects channels. `alpha`, `relative`: as there.
"""

from __future__ import annotations

from torch import Tensor

from convlora.methods.loralib_view import LoralibView, square


class Separable(LoralibView):
    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        alpha: float | None = None,
        relative: bool = True,
    ) -> None:
        super().__init__(w0, rank, shape=shape, alpha=alpha, relative=relative)

    def delta(self, w0: Tensor) -> Tensor:
        out, inputs, k = square(self.shape)
        product = (self.B @ self.A).view(out, k, inputs, k)
        return self.scale * product.transpose(1, 2).reshape(w0.shape)
