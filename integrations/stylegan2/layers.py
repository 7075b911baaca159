"""The layers of StyleGAN2, with the official parameter names.

Weights are stored at unit variance and scaled at run time (`weight_gain`). Each forward reads `self.weight` once,
so an adapter may turn it into a computed property.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.factored import LowRankWeight, linear
from convlora.integrations.stylegan2.ops import (
    bias_act,
    conv2d_resample,
    default_gain,
    differentiable,
    modulated_conv2d,
    setup_filter,
)
from convlora.layers import register_layer

FILTER = (1, 3, 3, 1)
NOISE_MODES = ("random", "const", "none")


def _scaled(weight: Tensor | LowRankWeight, gain: float, dtype: torch.dtype) -> Tensor | LowRankWeight:
    if gain == 1:
        return weight._replace(base=weight.base.to(dtype)) if isinstance(weight, LowRankWeight) else weight.to(dtype)
    if isinstance(weight, LowRankWeight):
        return LowRankWeight((weight.base * gain).to(dtype), weight.left * gain, weight.right)
    return (weight * gain).to(dtype)


class FullyConnectedLayer(nn.Module):
    """y = act(x (g W)^T + m b) with g = m / sqrt(in), m the learning-rate multiplier. x (..., in) -> (..., out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        default_gain(activation)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with(self.weight, x)

    def forward_with(self, weight: Tensor | LowRankWeight, x: Tensor) -> Tensor:
        """The forward with a given weight, which may stay factored."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if bias is not None and self.bias_gain != 1:
            bias = bias * self.bias_gain
        x = x * self.weight_gain  # rather than the weights, which are more
        weight = _scaled(weight, 1, x.dtype)
        product: Callable[..., Tensor] = linear if isinstance(weight, LowRankWeight) else F.linear
        if self.activation == "linear":
            return product(x, weight, bias)
        return bias_act(product(x, weight), bias, dim=-1, act=self.activation)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


class Conv2dLayer(nn.Module):
    """Plain convolution with resampling: bias_act(conv(x, W / sqrt(in kh kw)))."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] = FILTER,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.activation = activation
        self.up = up
        self.down = down
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = default_gain(activation)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", setup_filter(resample_filter))

    def forward(self, x: Tensor, gain: float = 1) -> Tensor:
        return self.forward_with(self.weight, x, gain)

    def forward_with(self, weight: Tensor | LowRankWeight, x: Tensor, gain: float = 1) -> Tensor:
        """The forward with a given weight, which may stay factored."""
        scaled = _scaled(weight, self.weight_gain, x.dtype)
        x = conv2d_resample(x, scaled, self.resample_filter, self.up, self.down, self.padding, flip_weight=self.up == 1)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, self.bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, up={self.up}, down={self.down}"


class SynthesisLayer(nn.Module):
    """Modulated convolution, noise, bias and activation. x (N, in, R/up, R/up), w (N, w_dim) -> (N, out, R, R)."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence[float] = FILTER,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.up = up
        self.use_noise = use_noise
        self.activation = activation
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.act_gain = default_gain(activation)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def noise(self, x: Tensor, noise_mode: str) -> Tensor | None:
        """(N, 1, R, R) or (R, R), scaled by noise_strength; None without noise."""
        if noise_mode not in NOISE_MODES:
            raise ConvloraError(f"noise_mode is {noise_mode!r}; one of {', '.join(NOISE_MODES)}")
        if not self.use_noise or noise_mode == "none":
            return None
        if noise_mode == "const":
            return self.noise_const * self.noise_strength
        shape = (x.shape[0], 1, self.resolution, self.resolution)
        return torch.randn(shape, device=x.device, dtype=self.noise_strength.dtype) * self.noise_strength

    def forward(
        self, x: Tensor, w: Tensor, noise_mode: str = "random", fused_modconv: bool = True, gain: float = 1
    ) -> Tensor:
        return self.forward_with(self.weight, x, w, noise_mode, fused_modconv, gain)

    def forward_with(
        self,
        weight: Tensor | LowRankWeight,
        x: Tensor,
        w: Tensor,
        noise_mode: str = "random",
        fused_modconv: bool = True,
        gain: float = 1,
    ) -> Tensor:
        """The forward with a given weight, which may stay factored."""
        x = modulated_conv2d(
            x,
            weight,
            self.affine(w),
            noise=self.noise(x, noise_mode),
            up=self.up,
            padding=self.padding,
            resample_filter=self.resample_filter,
            flip_weight=self.up == 1,
            fused_modconv=fused_modconv,
        )
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        owned = not differentiable(x, self.bias)
        return bias_act(x, self.bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp, overwrite=owned)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, w_dim={self.w_dim}, "
            f"resolution={self.resolution}, up={self.up}"
        )


class ToRGBLayer(nn.Module):
    """1x1 modulated convolution without demodulation, to image channels. x (N, in, R, R), w (N, w_dim)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel_size: int = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.w_dim = w_dim
        self.conv_clamp = conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor, fused_modconv: bool = True) -> Tensor:
        return self.forward_with(self.weight, x, w, fused_modconv)

    def forward_with(self, weight: Tensor | LowRankWeight, x: Tensor, w: Tensor, fused_modconv: bool = True) -> Tensor:
        """The forward with a given weight, which may stay factored."""
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, weight, styles, padding=self.padding, demodulate=False, fused_modconv=fused_modconv)
        return bias_act(x, self.bias, clamp=self.conv_clamp)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, w_dim={self.w_dim}"


register_layer(FullyConnectedLayer, low_rank=FullyConnectedLayer.forward_with)
register_layer(Conv2dLayer, low_rank=Conv2dLayer.forward_with)
register_layer(SynthesisLayer, low_rank=SynthesisLayer.forward_with)
register_layer(ToRGBLayer, low_rank=ToRGBLayer.forward_with)
