"""Linear maps and convolutions by `base + left @ right`, of which only the factors learn, at a frozen weight's cost.

The forward is one convolution. Its backward needs the gradient of the input, as a frozen layer's does, and those of
`left (out, r)` and `right (r, cols)`, which come from projections to r channels: with `h` the convolution of x by
`right` and `g = leftᵀ·grad_y`,

    grad_left = Σ grad_y · h        grad_right = the weight gradient of x against g

so no convolution makes the `out × cols` gradient of the weight, and x is all that is kept of the forward. Everything
here is made of differentiable operations: double backward, `torch.func` and `torch.compile` see through it.

Factors with a batch dimension are a change for each sample (`convlora.per_sample`).
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora import per_sample
from convlora.geometry import Geometry, narrow, narrow_gradient, over_samples, widen


class LowRankWeight(NamedTuple):
    """A weight that was not multiplied out: `base + (left @ right)` in base's shape."""

    base: Tensor
    left: Tensor  # (out, r), or (N, out, r): another change for each sample of a batch of N
    right: Tensor  # (r, cols), or (N, r, cols)
    whole: Tensor | None = None  # what `summed` made

    @property
    def differs(self) -> bool:
        """Whether each sample has a change of its own."""
        return self.left.ndim > 2 or self.right.ndim > 2

    def dense(self) -> Tensor:
        """Added in the factors' precision, in base's memory format; of a change for each sample, (N, *base.shape)."""
        base, left, right, _ = self
        if self.differs:
            return (base + (left @ right).unflatten(-1, base.shape[1:])).to(base.dtype)
        if not base.is_contiguous():
            return (base + (left @ right).view_as(base)).to(base.dtype)
        return torch.addmm(base.flatten(1).to(left.dtype), left, right).view_as(base).to(base.dtype)

    def summed(self) -> LowRankWeight:
        """The same, knowing its sum for whoever computes forward with it more than once."""
        with torch.no_grad():
            return self._replace(whole=self.dense())


def power(weight: LowRankWeight) -> Tensor:
    """Sums of squares over a convolution's positions, (out, in/groups), with a backward through the factors."""
    if weight.base.requires_grad:
        return _power(weight.dense())
    return _Power.apply(*weight)


def linear(x: Tensor, weight: LowRankWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ (base + left @ right)ᵀ + bias`, x (..., in)."""
    base, left, right, _ = weight
    if weight.differs:
        return per_sample.linear(x, base, left, right, bias)
    if base.requires_grad:
        return F.linear(x, weight.dense(), bias)
    rows = x.numel() // x.shape[-1]
    if rows * sum(base.shape) <= _PASSES * base.numel():
        return F.linear(x, base, bias) + F.linear(F.linear(x, right), left)
    return _run(_Linear, x, *weight[:3], bias)


def convolve(x: Tensor, weight: LowRankWeight, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`torch.convolution` of x `(N, in, ...)`, grouped or transposed too; `bias (out,)` may be trained."""
    if weight.differs:
        return per_sample.convolve(x, *weight[:3], bias, geometry)
    if weight.base.requires_grad:
        return geometry.convolve(x, weight.dense(), bias)
    if x.ndim == 3:  # one dimension is two of which one has size 1
        flat = LowRankWeight(weight.base.unsqueeze(2), weight.left, weight.right)
        return _run(_Convolution, x.unsqueeze(2), *flat, bias, geometry.with_a_row()).squeeze(2)
    return _run(_Convolution, x, *weight, bias, geometry)


def _run(function: type[torch.autograd.Function], x: Tensor, *rest: Any) -> Tensor:
    """Apply in autocast's precision, with the sum of the weights in their own."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return function.apply(x, *rest)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return function.apply(x.to(dtype), *rest)


# A sum of weights passes over them about this often, where adding at the output passes over that once.
_PASSES = 2


class _Linear(torch.autograd.Function):
    """With the weights summed: for many rows, where adding the factors' product at the output costs more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, base: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(
            x, LowRankWeight(base, left, right).dense().to(x.dtype), None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, base, left, right = ctx.saved_tensors
        need_x, _, need_left, need_right, need_bias = ctx.needs_input_grad
        rows, grad_rows = x.flatten(0, -2), grads[0].flatten(0, -2)
        grad_x = grads[0] @ LowRankWeight(base, left, right).dense().to(x.dtype) if need_x else None
        # (grad_rowsᵀ·h, a product to 2 to 9 columns, takes a CPU 15 times as long)
        grad_left = ((rows @ right.to(x.dtype).mT).mT @ grad_rows).mT.to(left.dtype) if need_left else None
        grad_right = ((grad_rows @ left.to(x.dtype)).mT @ rows).to(right.dtype) if need_right else None
        return grad_x, None, grad_left, grad_right, grad_rows.sum(0) if need_bias else None


class _Convolution(torch.autograd.Function):
    """With the weights summed, or the factors' part added at the output: whichever passes over fewer values.

    `wide` is the side with the channels of `right`'s columns, `other` that with the channels of `left`'s rows: x and
    y, but the other way round for torch's transposed convolutions. Groups share `right`, so they go to the batch.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        base: Tensor,
        left: Tensor,
        right: Tensor,
        whole: Tensor | None,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if whole is None and _sums(x, base, geometry):
            whole = LowRankWeight(base, left, right).dense()
        if whole is not None:
            return geometry.convolve(x, whole.to(x.dtype), bias)
        y = geometry.convolve(x, base.to(x.dtype), bias)
        near, filters = _typed(left, right, base, x.dtype)
        if geometry.left_on_output:
            return _mixed(y, near, narrow(x, filters, y.shape[2:], geometry), geometry.groups)
        return y + widen(_project(x, near, geometry.groups), filters, y.shape[2:], geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.geometry = inputs[6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, base, left, right = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        grad_y = grads[0]
        need_x, _, need_left, need_right, _, need_bias, _ = ctx.needs_input_grad
        near, filters = _typed(left, right, base, x.dtype)
        groups, sums, on_output = geometry.groups, _sums(x, base, geometry), geometry.left_on_output
        wide, other = (x, grad_y) if on_output else (grad_y, x)
        mixes, widens = (need_x and not sums and side for side in (not on_output, on_output))
        grad_x: Any = None
        grad_left = grad_right = None
        if need_x:
            weight = LowRankWeight(base, left, right).dense() if sums else base
            grad_x = geometry.input_gradient(grad_y, x, weight.to(x.dtype))
        if need_left or mixes:  # x alone may want a gradient: in front of an adapter that does not learn
            h = narrow(wide, filters, other.shape[2:], geometry)
            grad_left = _paired(other, h, groups).to(left.dtype) if need_left else None
            grad_x = _mixed(grad_x, near, h, groups) if mixes else grad_x
        if need_right or widens:
            g = _project(other, near, groups)
            grad_right = narrow_gradient(g, wide, filters, geometry).flatten(1).to(right.dtype) if need_right else None
            grad_x = grad_x + widen(g, filters, x.shape[2:], geometry) if widens else grad_x
        grad_bias = grad_y.sum((0, *range(2, grad_y.ndim))) if need_bias else None
        return grad_x, None, grad_left, grad_right, None, grad_bias, None


class _Power(torch.autograd.Function):
    """Of the summed weights. What goes back to them, `2·grad·weight`, costs no convolution and meets the factors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor, left: Tensor, right: Tensor, whole: Tensor | None) -> Tensor:
        return _power(LowRankWeight(base, left, right).dense() if whole is None else whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        base, left, right = ctx.saved_tensors
        whole = LowRankWeight(base, left, right).dense()
        back = (whole.flatten(2) * (2 * grads[0]).to(whole.dtype).unsqueeze(-1)).flatten(1).to(left.dtype)
        return None, (right @ back.mT).mT, left.mT @ back, None


def _power(weight: Tensor) -> Tensor:
    return weight.square().sum(dim=tuple(range(2, weight.ndim)))


def _sums(x: Tensor, base: Tensor, geometry: Geometry) -> bool:
    """Whether summing the weights is cheaper than adding at the output (and, going back, at the input)."""
    positions = x.shape[0] * prod(x.shape[2:])
    grown = prod(geometry.stride)
    outputs = base.shape[1] * geometry.groups if geometry.transposed and not geometry.swapped else base.shape[0]
    at_output = positions * outputs * grown if geometry.transposed else positions * outputs // grown
    return at_output + positions * x.shape[1] > _PASSES * base.numel()


def _typed(left: Tensor, right: Tensor, base: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`left`, and `right` as filters (r, in/groups, *kernel)."""
    return left.to(dtype), right.view(-1, *base.shape[1:]).to(dtype)


# ---- between r channels and those of `left`'s rows


def _project(other: Tensor, left: Tensor, groups: int) -> Tensor:
    """g = leftᵀ·other: (N, G·o, *grid) -> (N·G, r, *grid)."""
    N, _, *grid = other.shape
    g = left.unflatten(0, (groups, -1)).mT @ other.reshape(N, groups, -1, prod(grid))
    return g.reshape(N * groups, -1, *grid)


def _mixed(other: Tensor, left: Tensor, h: Tensor, groups: int) -> Tensor:
    """other + left·h, h (N·G, r, *grid), in other's memory format."""
    N, channels, *grid = other.shape
    if groups == 1 and _is_channels_last(other):
        rows = torch.baddbmm(other.flatten(2).mT, h.flatten(2).mT, left.mT.expand(N, -1, -1))
        return rows.mT.view(other.shape)
    flat = other.reshape(N * groups, channels // groups, prod(grid))
    mixing = left.unflatten(0, (groups, -1)).repeat(N, 1, 1)
    return torch.baddbmm(flat, mixing, h.flatten(2)).view(other.shape)


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.stride(1) == 1 < x.stride(3)


def _paired(other: Tensor, h: Tensor, groups: int) -> Tensor:
    """Σ over samples and positions of other · h: the gradient of `left`, (G·o, r)."""
    N, _, *grid = other.shape
    # (other·hᵀ, a product to 2 to 9 columns, takes a CPU 15 times as long)
    products = h.reshape(N, groups, -1, prod(grid)) @ other.reshape(N, groups, -1, prod(grid)).mT
    return over_samples(products).mT.flatten(0, 1)
