"""Linear maps and convolutions by `base + left @ right`, of which only the factors learn, at a frozen weight's cost.

The forward is one convolution. Its backward needs the gradient of the input, as a frozen layer's does, and those of
`left (out, r)` and `right (r, cols)`, which come from projections to r channels: with `h` the convolution of x by
`right` and `g = leftᵀ·grad_y`,

    grad_left = Σ grad_y · h        grad_right = the weight gradient of x against g

so the `out × cols` gradient of the weight never exists, and x is all that is kept of the forward. Everything here is
made of differentiable operations: double backward, `torch.func` and `torch.compile` see through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRankWeight(NamedTuple):
    """A weight that was not multiplied out: `base + (left @ right)` in base's shape."""

    base: Tensor
    left: Tensor  # (out, r)
    right: Tensor  # (r, cols)

    def dense(self) -> Tensor:
        """Added in the factors' precision, in base's memory format."""
        base, left, right = self
        if not base.is_contiguous():
            return (base + (left @ right).view_as(base)).to(base.dtype)
        return torch.addmm(base.flatten(1).to(left.dtype), left, right).view_as(base).to(base.dtype)


class Geometry(NamedTuple):
    """The arguments of `torch.convolution` after the tensors, one number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int = 1
    swapped: bool = False  # a transposed convolution, without groups, whose weight is stored (out, in, ...)

    @property
    def left_on_output(self) -> bool:
        """Whether the factor `left` mixes output channels; torch's own transposed weights have inputs first."""
        return self.transposed == self.swapped

    def with_a_row(self) -> Geometry:
        """The same in two dimensions, the first of size 1."""
        stride, padding, dilation, transposed, output_padding, groups, swapped = self
        return Geometry((1, *stride), (0, *padding), (1, *dilation), transposed, (0, *output_padding), groups, swapped)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(x, self._native(weight), bias, *self[:6])

    def input_gradient(self, grad_y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Of `convolve`; of x, only the shape counts."""
        return self._backward(grad_y, x, weight, (True, False, False))[0]

    def weight_gradient(self, grad_y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Of `convolve`; of the weight, only the shape counts."""
        return self._native(self._backward(grad_y, x, weight, (False, True, False))[1])

    def _native(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, 1) if self.swapped else weight

    def _backward(self, grad_y: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        return torch.ops.aten.convolution_backward(grad_y, x, self._native(weight), None, *self[:6], wanted)


def linear(x: Tensor, weight: LowRankWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ (base + left @ right)ᵀ + bias`, x (..., in)."""
    base, left, right = weight
    if base.requires_grad:
        return F.linear(x, weight.dense(), bias)
    rows = x.numel() // x.shape[-1]
    if rows * sum(base.shape) <= _PASSES * base.numel():
        return F.linear(x, base, bias) + F.linear(F.linear(x, right), left)
    return _run(_Linear, x, weight, bias)


def convolve(x: Tensor, weight: LowRankWeight, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """`torch.convolution` of x `(N, in, ...)`, grouped or transposed too; `bias (out,)` may be trained."""
    if weight.base.requires_grad:
        return geometry.convolve(x, weight.dense(), bias)
    if x.ndim == 3:  # one dimension is two of which one has size 1
        flat = LowRankWeight(weight.base.unsqueeze(2), weight.left, weight.right)
        return _run(_Convolution, x.unsqueeze(2), flat, bias, geometry.with_a_row()).squeeze(2)
    return _run(_Convolution, x, weight, bias, geometry)


def _run(function: type[torch.autograd.Function], x: Tensor, weight: LowRankWeight, *rest: Any) -> Tensor:
    """Apply in autocast's precision, with the sum of the weights in their own."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return function.apply(x, *weight, *rest)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return function.apply(x.to(dtype), *weight, *rest)


# A sum of weights passes over them about this often, where adding at the output passes over that once.
_PASSES = 2
# The widest product, in channels of the wide side, that replaces a convolution to r channels.
_FEW = 1


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
        grad_left = (grad_rows.mT @ (rows @ right.to(x.dtype).mT)).to(left.dtype) if need_left else None
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
        x: Tensor, base: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        if _sums(x, base, geometry):
            return geometry.convolve(x, LowRankWeight(base, left, right).dense().to(x.dtype), bias)
        y = geometry.convolve(x, base.to(x.dtype), bias)
        near, filters = _typed(left, right, base, x.dtype)
        if geometry.left_on_output:
            return _mixed(y, near, _narrow(x, filters, y.shape[2:], geometry), geometry.groups)
        return y + _widen(_project(x, near, geometry.groups), filters, y.shape[2:], geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.geometry = inputs[5]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, base, left, right = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        grad_y = grads[0]
        need_x, _, need_left, need_right, need_bias, _ = ctx.needs_input_grad
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
            h = _narrow(wide, filters, other.shape[2:], geometry)
            grad_left = _paired(other, h, groups).to(left.dtype) if need_left else None
            grad_x = _mixed(grad_x, near, h, groups) if mixes else grad_x
        if need_right or widens:
            g = _project(other, near, groups)
            grad_right = _narrow_gradient(g, wide, filters, geometry).flatten(1).to(right.dtype) if need_right else None
            grad_x = grad_x + _widen(g, filters, x.shape[2:], geometry) if widens else grad_x
        return grad_x, None, grad_left, grad_right, grad_y.sum((0, *range(2, grad_y.ndim))) if need_bias else None, None


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
    products = other.reshape(N, groups, -1, prod(grid)) @ h.reshape(N, groups, -1, prod(grid)).mT
    return products.sum(0).flatten(0, 1)


# ---- between r channels and those of `right`'s columns
#
# With few channels on one side, a convolution is a product with the other side's values as they lie (no im2col of
# them), and a shift and sum (fold) or shift and copy (unfold) of r·kh·kw channels. A library's convolution to one
# channel takes 3 to 8 times as long on a CPU.


def _narrow(wide: Tensor, filters: Tensor, grid: Sequence[int], geometry: Geometry) -> Tensor:
    """h: wide (N, G·c, *grid) through `filters` (r, c, *kernel) -> (N·G, r, *grid)."""
    wide = _groups_to_batch(wide, geometry)
    if _skinny(filters, geometry):
        values = _positions(filters, geometry) @ wide.flatten(2)
        shifts = _shifts(filters, geometry)
        if geometry.swapped:
            return F.fold(values, tuple(grid), **shifts, stride=geometry.stride)
        whole = F.fold(values, _unstrided(filters, wide.shape[2:], geometry), **shifts)
        return whole[..., :: geometry.stride[0], :: geometry.stride[1]]
    alone = geometry._replace(groups=1)
    if geometry.left_on_output:
        return alone.convolve(wide, filters)
    return alone.input_gradient(wide, wide.new_empty(()).expand(len(wide), len(filters), *grid), filters)


def _widen(g: Tensor, filters: Tensor, grid: Sequence[int], geometry: Geometry) -> Tensor:
    """The adjoint of `_narrow`: g (N·G, r, *grid) -> (N, G·c, *grid)."""
    channels = filters.shape[1]
    if _skinny(filters, geometry):
        columns = _columns(g, filters, grid, geometry)
        wide = _positions(filters, geometry).mT @ columns
    elif geometry.left_on_output:
        like = g.new_empty(()).expand(len(g), channels, *grid)
        wide = geometry._replace(groups=1).input_gradient(g, like, filters)
    else:
        wide = geometry._replace(groups=1).convolve(g, filters)
    return wide.reshape(-1, geometry.groups * channels, *grid)


def _narrow_gradient(g: Tensor, wide: Tensor, filters: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `filters` from that of `_narrow`'s result, (r, c, *kernel)."""
    wide = _groups_to_batch(wide, geometry)
    if not _skinny(filters, geometry):
        grad_y, x = (g, wide) if geometry.left_on_output else (wide, g)
        return geometry._replace(groups=1).weight_gradient(grad_y, x, filters)
    columns = _columns(g, filters, wide.shape[2:], geometry)
    values = (columns @ wide.flatten(2).mT).sum(0).view(len(filters), *filters.shape[2:], -1).movedim(-1, 1)
    return values if geometry.swapped else values.flip(2, 3)


def _skinny(filters: Tensor, geometry: Geometry) -> bool:
    """Whether products pay: r·kh·kw channels are few, and the paddings such that fold knows them."""
    kernel = filters.shape[2:]
    if len(kernel) != 2 or len(filters) * prod(kernel) > _FEW * filters.shape[1]:
        return False
    within_reach = all(p <= d * (k - 1) for p, d, k in zip(geometry.padding, geometry.dilation, kernel))
    return within_reach and all(more < s for more, s in zip(geometry.output_padding, geometry.stride))


def _positions(filters: Tensor, geometry: Geometry) -> Tensor:
    """(r·kh·kw, c): the filters' values where they meet each position of the wide side."""
    filters = filters if geometry.swapped else filters.flip(2, 3)
    return filters.movedim(1, -1).flatten(0, 2)


def _shifts(filters: Tensor, geometry: Geometry) -> dict[str, Any]:
    """Arguments of fold and unfold. A correlation is the shift and sum with the kernel and its padding turned round."""
    kernel = tuple(filters.shape[2:])
    if geometry.swapped:
        padding = geometry.padding
    else:
        padding = tuple(d * (k - 1) - p for p, d, k in zip(geometry.padding, geometry.dilation, kernel))
    return {"kernel_size": kernel, "dilation": geometry.dilation, "padding": padding}


def _unstrided(filters: Tensor, grid: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """The size of the narrow side's grid, had the convolution no stride."""
    numbers = zip(grid, geometry.padding, geometry.dilation, filters.shape[2:])
    return tuple(n + 2 * p - d * (k - 1) for n, p, d, k in numbers)


def _columns(g: Tensor, filters: Tensor, grid: Sequence[int], geometry: Geometry) -> Tensor:
    """g's values that each position of the wide side (of this grid) meets: (N·G, r·kh·kw, positions)."""
    shifts = _shifts(filters, geometry)
    if geometry.swapped:
        return F.unfold(g, **shifts, stride=geometry.stride)
    if geometry.stride != (1, 1):
        strided = g
        g = g.new_zeros(*g.shape[:2], *_unstrided(filters, grid, geometry))
        g[..., :: geometry.stride[0], :: geometry.stride[1]] = strided
    return F.unfold(g, **shifts)


def _groups_to_batch(x: Tensor, geometry: Geometry) -> Tensor:
    return x.reshape(len(x) * geometry.groups, -1, *x.shape[2:])
