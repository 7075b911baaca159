"""One change per sample: `(base + left_i @ right_i)` for sample i, `left (N, out, r)` and `right (N, r, cols)`.

Many people in one batch, or the predictions of a hypernetwork, to which gradients must flow. All samples share one
product with `base`; beside it, each has its own r channels, added at the output:

    y_i = base·x_i + left_i·(right_i·x_i)

Everything is made of differentiable operations. A factor without the batch dimension is the same for all samples.
"""

from __future__ import annotations

from math import prod

import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.geometry import Geometry, narrow, widen


def linear(x: Tensor, base: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, …, in) -> (N, …, out)."""
    left, right = _matched(x, left, right)
    rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    y = F.linear(x, base, bias)
    return y + ((rows @ right.mT) @ left.mT).view_as(y)


def convolve(x: Tensor, base: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`torch.convolution` of x (N, in, *grid), grouped or transposed too."""
    left, right = _matched(x, left, right)
    y = geometry.convolve(x, base.to(x.dtype), None if bias is None else bias.to(x.dtype))
    near = left.unflatten(1, (geometry.groups, -1)).flatten(0, 1)  # (N·G, o, r)
    filters = right.unflatten(2, base.shape[1:])
    if geometry.left_on_output:
        h = narrow(x, filters, y.shape[2:], geometry)
        return y + (near @ h.flatten(2)).view_as(y)
    grid = x.shape[2:]
    g = near.mT @ x.reshape(len(near), -1, prod(grid))
    return y + widen(g.unflatten(2, grid), filters, y.shape[2:], geometry)


def _matched(x: Tensor, *factors: Tensor) -> list[Tensor]:
    """The factors with a batch dimension of x's size, in x's precision."""
    for factor in factors:
        if factor.ndim > 3 or (factor.ndim == 3 and len(factor) != len(x)):
            raise ConvloraError(
                f"an adapter with a change for each of {len(factor)} samples met a batch of {len(x)}: "
                "give it factors (N, …) for the N samples of its input"
            )
    return [factor.to(x.dtype).expand(len(x), *factor.shape[-2:]) for factor in factors]
