"""The operators of StyleGAN2: activation, FIR resampling, convolution with resampling, modulated convolution.

Equations: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", https://arxiv.org/abs/1912.04958,
and "Training Generative Adversarial Networks with Limited Data", https://arxiv.org/abs/2006.06676.
Argument names and order are those of NVIDIA's PyTorch release, so that calls written for it work here.
Everything is a handful of torch convolutions: differentiable to any order, on any device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.factored import Geometry, LowRankWeight, convolve, power

SQRT2 = math.sqrt(2)

# name -> (function of x and slope, default gain)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    "linear": (lambda x, _: x, 1.0),
    "relu": (lambda x, _: F.relu(x), SQRT2),
    "lrelu": (lambda x, slope: F.leaky_relu(x, slope), SQRT2),
    "tanh": (lambda x, _: torch.tanh(x), 1.0),
    "sigmoid": (lambda x, _: torch.sigmoid(x), 1.0),
    "elu": (lambda x, _: F.elu(x), 1.0),
    "selu": (lambda x, _: F.selu(x), 1.0),
    "softplus": (lambda x, _: F.softplus(x), 1.0),
    "swish": (lambda x, _: F.silu(x), SQRT2),
}

_HOMOGENEOUS = ("linear", "relu", "lrelu")


def default_gain(act: str) -> float:
    """Gain that follows an activation unless the caller gives one."""
    if act not in ACTIVATIONS:
        raise ConvloraError(f"unknown activation {act!r}; one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act][1]


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context that switches autocast off: positions, filters and sums of weights do not survive 8 bits of mantissa."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def normalize_2nd_moment(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """x divided by its root mean square over `dim`."""
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """clamp(gain * act(x + b), -clamp, clamp): bias along `dim`, each part optional. alpha is the slope of lrelu.

    overwrite=True may destroy x, for callers that own it and need no gradient through it: fresh memory costs a CPU
    more than the arithmetic.
    """
    overwrite = overwrite and not torch.compiler.is_compiling()  # a compiler reuses memory by itself
    gain = default_gain(act) if gain is None else gain
    slope = 0.2 if alpha is None else alpha
    early = gain if act in _HOMOGENEOUS and gain > 0 else 1.0  # a gain commutes with these: one pass with the bias
    if b is not None:
        shape = [1] * x.ndim
        shape[dim] = -1
        b = b.to(x.dtype).reshape(shape) * early
        x = torch.add(b, x, alpha=early, out=x) if overwrite else torch.add(b, x, alpha=early)
        overwrite = True
    elif early != 1:
        x, overwrite = (x.mul_(early) if overwrite else x * early), True
    if act == "lrelu":
        x = F.leaky_relu(x, slope, inplace=overwrite)  # the gradient needs its result alone
    else:
        x = ACTIVATIONS[act][0](x, slope)
    x = x if gain == early else x * gain
    if clamp is None:
        return x
    # Unlike clamp's, hardtanh's backward is a single pass.
    return F.hardtanh(x, -clamp, clamp, inplace=overwrite and not differentiable(x))


def differentiable(*tensors: Tensor) -> bool:
    """Whether autograd records what is done with any of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# ---- FIR resampling ------------------------------------------------------------------------------------------------


def setup_filter(
    f: Any, normalize: bool = True, flip_filter: bool = False, gain: float = 1, separable: bool | None = None
) -> Tensor:
    """float32 filter (kh, kw), or separable (taps,) from 8 taps on; f: 1-D or 2-D taps, a number, None = identity."""
    f = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ConvloraError(
            f"a resampling filter has 1 or 2 dimensions and at least one tap, not shape {tuple(f.shape)}"
        )
    f = f.reshape(1) if f.ndim == 0 else f
    separable = (f.ndim == 1 and f.numel() >= 8) if separable is None else separable
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    x, y = (value, value) if isinstance(value, int) else value
    return int(x), int(y)


def _padding4(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """int, (x, y) or (x0, x1, y0, y1) -> (x0, x1, y0, y1)."""
    if isinstance(padding, int):
        return (padding,) * 4
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    x0, x1, y0, y1 = padding
    return int(x0), int(x1), int(y0), int(y1)


def _filter_size(f: Tensor | None) -> tuple[int, int]:
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _insert_and_filter(x: Tensor, f: Tensor, up: tuple[int, int], padding: tuple[int, int, int, int]) -> Tensor:
    """Zero insertion, padding and true convolution with f (kh, kw): one transposed depth-wise convolution.

    A transposed convolution gives the *full* result; what the padding asks for is a crop of it (or zeros around it).
    """
    kh, kw = f.shape
    x0, x1, y0, y1 = padding
    cut = (kw - 1 - x0, kw - x1 - up[0], kh - 1 - y0, kh - y1 - up[1])
    extra = (cut[0] - cut[1], cut[2] - cut[3])
    weight = f.expand(x.shape[1], 1, kh, kw)
    stride = (up[1], up[0])
    if min(cut[0], cut[2]) >= 0 and 0 <= extra[0] < up[0] and 0 <= extra[1] < up[1]:
        return F.conv_transpose2d(
            x, weight, stride=stride, padding=(cut[2], cut[0]), output_padding=extra[::-1], groups=x.shape[1]
        )
    return F.pad(F.conv_transpose2d(x, weight, stride=stride, groups=x.shape[1]), [-c for c in cut])


def _filter_and_drop(x: Tensor, f: Tensor, down: tuple[int, int], padding: tuple[int, int, int, int]) -> Tensor:
    """Padding, true convolution with f (kh, kw) and every down-th pixel: one depth-wise convolution."""
    x0, x1, y0, y1 = padding
    symmetric = x0 == x1 >= 0 and y0 == y1 >= 0
    if not symmetric:
        x = F.pad(x, [x0, x1, y0, y1])
    weight = f.flip([0, 1]).expand(x.shape[1], 1, *f.shape)
    return F.conv2d(x, weight, stride=(down[1], down[0]), padding=(y0, x0) if symmetric else 0, groups=x.shape[1])


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Zero insertion, padding (negative = crop), true convolution with f * gain, decimation.

    x (N, C, H, W); f (kh, kw), or (taps,) applied along x and then y; up, down: int or (x, y);
    padding: int, (x, y) or (x0, x1, y0, y1), counted on the up-sampled grid. flip_filter=True correlates instead.
    """
    up, down, padding = _pair(up), _pair(down), _padding4(padding)
    f = x.new_ones((1, 1)) if f is None else f.to(device=x.device, dtype=x.dtype)
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    if f.ndim == 1:
        f = f * math.sqrt(gain)
        passes = [
            (f[None, :], (up[0], 1), (down[0], 1), (*padding[:2], 0, 0)),
            (f[:, None], (1, up[1]), (1, down[1]), (0, 0, *padding[2:])),
        ]
    else:
        passes = [(f * gain, up, down, padding)]
    with full_precision(x.device):
        for taps, u, d, pad in passes:
            if u == (1, 1):
                x = _filter_and_drop(x, taps, d, pad)
            else:
                x = _insert_and_filter(x, taps, u, pad)
                x = x if d == (1, 1) else x[:, :, :: d[1], :: d[0]]
    return x


def _grow(size: int, factor: int) -> tuple[int, int]:
    """Padding before and after that centres a filter of `size` taps when up-sampling by `factor`."""
    return (size + factor - 1) // 2, (size - factor) // 2


def _shrink(size: int, factor: int) -> tuple[int, int]:
    """Padding before and after that centres a filter of `size` taps when down-sampling by `factor`."""
    return (size - factor + 1) // 2, (size - factor) // 2


def _around(padding: int | Sequence[int], x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int, int, int]:
    x0, x1, y0, y1 = _padding4(padding)
    return x0 + x[0], x1 + x[1], y0 + y[0], y1 + y[1]


def filter2d(
    x: Tensor, f: Tensor, padding: int | Sequence[int] = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """FIR filter that keeps the size."""
    kw, kh = _filter_size(f)
    pad = _around(padding, (kw // 2, (kw - 1) // 2), (kh // 2, (kh - 1) // 2))
    return upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """(N, C, H, W) to (N, C, up H, up W); brightness is kept."""
    ux, uy = _pair(up)
    kw, kh = _filter_size(f)
    pad = _around(padding, _grow(kw, ux), _grow(kh, uy))
    return upfirdn2d(x, f, up=(ux, uy), padding=pad, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """(N, C, H, W) to (N, C, H/down, W/down)."""
    dx, dy = _pair(down)
    kw, kh = _filter_size(f)
    pad = _around(padding, _shrink(kw, dx), _shrink(kh, dy))
    return upfirdn2d(x, f, down=(dx, dy), padding=pad, flip_filter=flip_filter, gain=gain)


# ---- convolution ---------------------------------------------------------------------------------------------------


def _size(weight: Tensor | LowRankWeight) -> torch.Size:
    return (weight.base if isinstance(weight, LowRankWeight) else weight).shape


def _transposed_weight(w: Tensor, groups: int) -> Tensor:
    """(groups out, in, kh, kw) to the layout of conv_transpose2d, (groups in, out, kh, kw)."""
    if groups == 1:
        return w.transpose(0, 1)
    return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _flipped(w: Tensor | LowRankWeight) -> Tensor | LowRankWeight:
    """The kernel turned by 180 degrees."""
    if not isinstance(w, LowRankWeight):
        return w.flip([2, 3])
    base, left, right, _ = w
    return LowRankWeight(base.flip([2, 3]), left, right.unflatten(-1, base.shape[1:]).flip([-2, -1]).flatten(-3))


def _convolve(
    x: Tensor, w: Tensor | LowRankWeight, groups: int, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    if isinstance(w, LowRankWeight):
        return convolve(x, w, None, Geometry((stride, stride), padding, (1, 1), False, (0, 0), groups))
    return F.conv2d(x, w, None, stride, padding, groups=groups)


def _convolve_transposed(
    x: Tensor, w: Tensor | LowRankWeight, groups: int, stride: int, padding: tuple[int, int]
) -> Tensor:
    """With w (groups out, in, kh, kw), unlike torch's own."""
    if isinstance(w, LowRankWeight):
        return convolve(x, w, None, Geometry((stride, stride), padding, (1, 1), True, (0, 0), groups, swapped=True))
    return F.conv_transpose2d(x, _transposed_weight(w, groups), stride=stride, padding=padding, groups=groups)


def conv2d_resample(
    x: Tensor,
    w: Tensor | LowRankWeight,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """Convolution of x (N, groups in, H, W) with w (out, in, kh, kw), up- or down-sampled through the FIR filter f.

    flip_weight=True correlates (what torch calls convolution), False is the true convolution of StyleGAN2's up-convs.
    The padding happens once, at the beginning, and is counted on the up-sampled grid.
    """
    kh, kw = _size(w)[-2:]
    fw, fh = _filter_size(f)
    pad = _padding4(padding)
    if up > 1:
        pad = _around(pad, _grow(fw, up), _grow(fh, up))
    if down > 1:
        pad = _around(pad, _shrink(fw, down), _shrink(fh, down))
    flip = not flip_weight and (kh, kw) != (1, 1)

    if up > 1 and (kh, kw) == (1, 1) and down == 1:  # the 1x1 kernel commutes with the filter: small grid first
        x = _convolve(x, w, groups)
        return upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=up**2)
    if up > 1:  # a transposed convolution is a true one on the zero-inserted grid; the filter follows it
        kernel = w if not flip_weight else _flipped(w)
        x0, x1, y0, y1 = _around(pad, (1 - kw, up - kw), (1 - kh, up - kh))
        crop_x, crop_y = max(min(-x0, -x1), 0), max(min(-y0, -y1), 0)
        x = _convolve_transposed(x, kernel, groups, up, (crop_y, crop_x))
        pad = _around((x0, x1, y0, y1), (crop_x, crop_x), (crop_y, crop_y))
        x = upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=up**2)
        return x if down == 1 else upfirdn2d(x, f, down=down, flip_filter=flip_filter)
    w = _flipped(w) if flip else w
    if down > 1 and (kh, kw) == (1, 1):
        return _convolve(upfirdn2d(x, f, down=down, padding=pad, flip_filter=flip_filter), w, groups)
    if down > 1:
        return _convolve(upfirdn2d(x, f, padding=pad, flip_filter=flip_filter), w, groups, down)
    if pad[0] == pad[1] >= 0 and pad[2] == pad[3] >= 0:
        return _convolve(x, w, groups, 1, (pad[2], pad[0]))
    return _convolve(F.pad(x, list(pad)), w, groups)


def demodulation(weight: Tensor | LowRankWeight, styles: Tensor) -> Tensor:
    """Factors (N, out) that bring the outputs back to unit variance, without a weight per sample."""
    if isinstance(weight, LowRankWeight) and weight.differs:
        return (_energy_of_each(weight, styles).clamp(min=0) + 1e-8).rsqrt()
    energy = power(weight) if isinstance(weight, LowRankWeight) else weight.square().sum(dim=(2, 3))
    return (styles.to(energy.dtype).square() @ energy.t() + 1e-8).rsqrt()


def _energy_of_each(weight: LowRankWeight, styles: Tensor) -> Tensor:
    """The styled weights' sums of squares (N, out), of a change for each sample.

    ||s∘(w + l·r)||² = ||s∘w||² + 2 l·⟨w, s²∘r⟩ + l·⟨r, s²∘r⟩·l for the row w of the base, l of left and all rows r of
    right: products with the one base, of N·r columns, and no weight for each sample.
    """
    base, left, right, _ = weight
    squares = styles.to(base.dtype).square()
    filters = squares[:, None, :, None] * right.unflatten(-1, (base.shape[1], -1))  # (N, r, in, kh kw)
    filters = filters.flatten(2)
    cross = 2 * F.linear(filters, base.flatten(1))  # (N, r, out)
    gram = filters @ right.mT  # (N, r, r)
    frozen = squares @ base.square().sum(dim=(2, 3)).t()
    return frozen + ((cross + (left @ gram).mT) * left.mT).sum(1)


def prenormalize(weight: Tensor | LowRankWeight, styles: Tensor) -> tuple[Tensor | LowRankWeight, Tensor]:
    """Scale weight and styles so that a float16 convolution cannot overflow; demodulation cancels both scales."""
    styles = styles / styles.norm(float("inf"), dim=1, keepdim=True)
    if isinstance(weight, LowRankWeight):
        with torch.no_grad():  # cancelled, so no gradient either
            whole = weight.dense()
            scale = _largest(whole)
        return LowRankWeight(weight.base / scale, weight.left / scale.flatten(1), weight.right), styles
    return weight / _largest(weight), styles


def _largest(weight: Tensor) -> Tensor:
    """√fan_in times each output's largest weight, over all samples where they differ: (out, 1, 1, 1)."""
    fan_in = math.prod(weight.shape[-3:])
    largest = math.sqrt(fan_in) * weight.norm(float("inf"), dim=(-3, -2, -1), keepdim=True)
    return largest if weight.ndim == 4 else largest.amax(0)


def _mixed(x: Tensor, weight: Tensor | LowRankWeight, styles: Tensor) -> Tensor:
    """A modulated 1x1 convolution without demodulation, in x's memory format.

    Where few channels come out, multiplying x by its styles, and their gradient, would cost more than the product.
    """
    if isinstance(weight, LowRankWeight):
        with full_precision(x.device):
            weight = weight.dense()
    kernels = (weight.flatten(-3) * styles[:, None]).to(x.dtype)  # (N, out, in)
    if x.is_contiguous():
        return (kernels @ x.flatten(2)).unflatten(2, x.shape[2:])
    rows: Tensor = _Rows.apply(x.flatten(2).mT, kernels)
    return rows.mT.unflatten(2, x.shape[2:])


class _Rows(torch.autograd.Function):
    """rows (N, P, in) @ kernels (N, out, in)ᵀ; autograd's own rowsᵀ @ grad takes four times as long on a CPU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, kernels: Tensor) -> Tensor:
        return rows @ kernels.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernels = ctx.saved_tensors
        need_rows, need_kernels = ctx.needs_input_grad
        return grads[0] @ kernels if need_rows else None, grads[0].mT @ rows if need_kernels else None


def modulated_conv2d(
    x: Tensor,
    weight: Tensor | LowRankWeight,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool = True,
) -> Tensor:
    """StyleGAN2's convolution: weight (out, in, kh, kw) scaled per sample and input channel by styles (N, in).

    x (N, in, H, W) -> (N, out, up H / down, up W / down), plus noise (broadcast over channels).
    fused_modconv=True builds one weight per sample and runs a grouped convolution; False scales x and the result
    around one convolution with the shared weight, which is equal and needs no per-sample weight. So does a
    LowRankWeight in either case if autograd records: it stays factored, and no convolution makes its gradient. So
    does one with a change for each sample (factors with a batch dimension). A 1x1 kernel without demodulation, which
    is ToRGB's, is a product with a small matrix of each sample in any case.
    """
    if not demodulate and up == down == 1 and padding == 0 and _size(weight)[2:] == (1, 1):
        y = _mixed(x, weight, styles)
        return y if noise is None else y + noise.to(y.dtype)
    with full_precision(x.device):
        if isinstance(weight, LowRankWeight) and fused_modconv and not (torch.is_grad_enabled() or weight.differs):
            weight = weight.dense()
        if x.dtype == torch.float16 and demodulate:
            weight, styles = prenormalize(weight, styles)
        if isinstance(weight, LowRankWeight) and demodulate and not (weight.differs or weight.base.requires_grad):
            weight = weight.summed()  # for the convolution and its demodulation
    if fused_modconv and not isinstance(weight, LowRankWeight):
        n, channels = x.shape[:2]
        per_sample = weight.unsqueeze(0) * styles[:, None, :, None, None]
        if demodulate:
            per_sample = per_sample * (per_sample.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        kernels = per_sample.flatten(0, 1).to(x.dtype)
        if n == 1:  # without reshaping, which would lose x's memory format
            x = conv2d_resample(x, kernels, resample_filter, up, down, padding, 1, flip_weight)
        else:
            x = x.reshape(1, n * channels, *x.shape[2:])
            x = conv2d_resample(x, kernels, resample_filter, up, down, padding, n, flip_weight)
            x = x.reshape(n, -1, *x.shape[2:])
    else:
        x = x * styles.to(x.dtype)[:, :, None, None]
        shared = weight if isinstance(weight, LowRankWeight) else weight.to(x.dtype)
        x = conv2d_resample(x, shared, resample_filter, up, down, padding, 1, flip_weight)
        if demodulate:
            with full_precision(x.device):
                factors = demodulation(weight, styles).to(x.dtype)[:, :, None, None]
            x = x * factors if differentiable(x, factors) else x.mul_(factors)
    if noise is None:
        return x
    # x is made here, of operations whose gradients need their inputs; a compiler reuses memory by itself
    return x + noise.to(x.dtype) if torch.compiler.is_compiling() else x.add_(noise.to(x.dtype))
