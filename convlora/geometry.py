"""A convolution's geometry, and the convolutions to and from r channels that low-rank changes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The widest product, in channels of the wide side, that replaces a convolution to r channels.
_FEW = 1


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


# ---- between r channels and those of `right`'s columns
#
# With few channels on one side, a convolution is a product with the other side's values as they lie (no im2col of
# them), and a shift and sum (fold) or shift and copy (unfold) of r·kh·kw channels. A library's convolution to one
# channel takes 3 to 8 times as long on a CPU.


def narrow(wide: Tensor, filters: Tensor, grid: Sequence[int], geometry: Geometry) -> Tensor:
    """h: wide (N, G·c, *grid) through `filters` (r, c, *kernel) -> (N·G, r, *grid).

    Each sample may have filters of its own, (N, r, c, *kernel).
    """
    wide, filters = groups_to_batch(wide, geometry), _for_groups(filters, geometry)
    if _skinny(filters, geometry):
        values = _positions(filters, geometry) @ wide.flatten(2)
        shifts = _shifts(filters, geometry)
        if geometry.swapped:
            return F.fold(values, tuple(grid), **shifts, stride=geometry.stride)
        whole = F.fold(values, _unstrided(filters, wide.shape[2:], geometry), **shifts)
        return whole[..., :: geometry.stride[0], :: geometry.stride[1]]
    if _differ(filters, geometry):
        return _convolve_each(wide, filters, geometry)
    alone = geometry._replace(groups=1)
    if geometry.left_on_output:
        return alone.convolve(wide, filters)
    return alone.input_gradient(wide, wide.new_empty(()).expand(len(wide), len(filters), *grid), filters)


def widen(g: Tensor, filters: Tensor, grid: Sequence[int], geometry: Geometry) -> Tensor:
    """The adjoint of `narrow`: g (N·G, r, *grid) -> (N, G·c, *grid).

    Filters of each sample are for transposed convolutions only, whose forward this is.
    """
    filters = _for_groups(filters, geometry)
    _, channels, *_ = _sizes(filters, geometry)
    if _skinny(filters, geometry):
        columns = _columns(g, filters, grid, geometry)
        wide = _positions(filters, geometry).mT @ columns
    elif _differ(filters, geometry):
        wide = _convolve_each(g, filters, geometry)
    elif geometry.left_on_output:
        like = g.new_empty(()).expand(len(g), channels, *grid)
        wide = geometry._replace(groups=1).input_gradient(g, like, filters)
    else:
        wide = geometry._replace(groups=1).convolve(g, filters)
    return wide.reshape(-1, geometry.groups * channels, *grid)


def narrow_gradient(g: Tensor, wide: Tensor, filters: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `filters` from that of `narrow`'s result, (r, c, *kernel)."""
    wide = groups_to_batch(wide, geometry)
    if not _skinny(filters, geometry):
        grad_y, x = (g, wide) if geometry.left_on_output else (wide, g)
        return geometry._replace(groups=1).weight_gradient(grad_y, x, filters)
    columns = _columns(g, filters, wide.shape[2:], geometry)
    values = over_samples(columns @ wide.flatten(2).mT).view(len(filters), *filters.shape[2:], -1).movedim(-1, 1)
    return values if geometry.swapped else values.flip(2, 3)


def _sizes(filters: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """(r, c, *kernel), whether or not every sample has filters of its own."""
    return tuple(filters.shape[-2 - len(geometry.stride) :])


def _differ(filters: Tensor, geometry: Geometry) -> bool:
    return filters.ndim > 2 + len(geometry.stride)


def _for_groups(filters: Tensor, geometry: Geometry) -> Tensor:
    """Each sample's filters once for each of its groups, which are samples from here on."""
    return filters.repeat_interleave(geometry.groups, 0) if _differ(filters, geometry) else filters


def _convolve_each(x: Tensor, filters: Tensor, geometry: Geometry) -> Tensor:
    """x (M, channels, *grid) by filters (M, r, c, *kernel) of its own: one convolution of M groups."""
    kernels = (filters.transpose(1, 2) if geometry.swapped else filters).flatten(0, 1)
    together = geometry._replace(groups=len(x), swapped=False)
    return together.convolve(x.flatten(0, 1)[None], kernels)[0].unflatten(0, (len(x), -1))


def _skinny(filters: Tensor, geometry: Geometry) -> bool:
    """Whether products pay: r·kh·kw channels are few, and the paddings such that fold knows them."""
    rank, channels, *kernel = _sizes(filters, geometry)
    if len(kernel) != 2 or rank * prod(kernel) > _FEW * channels:
        return False
    within_reach = all(p <= d * (k - 1) for p, d, k in zip(geometry.padding, geometry.dilation, kernel))
    return within_reach and all(more < s for more, s in zip(geometry.output_padding, geometry.stride))


def _positions(filters: Tensor, geometry: Geometry) -> Tensor:
    """(…, r·kh·kw, c): the filters' values where they meet each position of the wide side."""
    filters = filters if geometry.swapped else filters.flip(-2, -1)
    return filters.movedim(-3, -1).flatten(-4, -2)


def _shifts(filters: Tensor, geometry: Geometry) -> dict[str, Any]:
    """Arguments of fold and unfold. A correlation is the shift and sum with the kernel and its padding turned round."""
    _, _, *kernel = _sizes(filters, geometry)
    if geometry.swapped:
        padding = geometry.padding
    else:
        padding = tuple(d * (k - 1) - p for p, d, k in zip(geometry.padding, geometry.dilation, kernel))
    return {"kernel_size": tuple(kernel), "dilation": geometry.dilation, "padding": padding}


def _unstrided(filters: Tensor, grid: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """The size of the narrow side's grid, had the convolution no stride."""
    numbers = zip(grid, geometry.padding, geometry.dilation, _sizes(filters, geometry)[2:])
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


def over_samples(values: Tensor) -> Tensor:
    """The sum over the first dimension, which for a single sample needs no pass."""
    return values[0] if len(values) == 1 else values.sum(0)


def groups_to_batch(x: Tensor, geometry: Geometry) -> Tensor:
    return x.reshape(len(x) * geometry.groups, -1, *x.shape[2:])
