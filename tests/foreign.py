"""Generators in the manner of well-known code bases, written for these tests: their habits, at toy size.

`FAMILIES` maps a name to a builder of (network, inputs), where the network is in eval mode and float64, and the
classes of layers that must be found in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Family(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    layers: tuple[type[nn.Module], ...]  # every instance must be adaptable; nothing else may be


# ------------------------------------------------------------------- in the manner of NVIDIA's StyleGAN2


class FullyConnected(nn.Module):
    """Raw weight of variance 1/lr², scaled by a `weight_gain` at run time."""

    def __init__(self, inputs: int, outputs: int, lr: float = 1.0, bias_init: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr)
        self.bias = nn.Parameter(torch.full((outputs,), bias_init))
        self.weight_gain, self.bias_gain = lr / math.sqrt(inputs), lr

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias[None] * self.bias_gain, x, (self.weight.to(x.dtype) * self.weight_gain).t())


def modulate(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool, grouped: bool) -> Tensor:
    """A functional modulated convolution: the layer passes its raw weight in."""
    w = weight[None] * styles[:, None, :, None, None]
    d = (w.square().sum((2, 3, 4)) + 1e-8).rsqrt() if demodulate else torch.ones_like(w[:, :, 0, 0, 0])
    padding = weight.shape[-1] // 2
    if not grouped:
        return F.conv2d(x * styles[:, :, None, None], weight, padding=padding) * d[:, :, None, None]
    n, _, height, width = x.shape
    w = (w * d[:, :, None, None, None]).flatten(0, 1)
    return F.conv2d(x.reshape(1, -1, height, width), w, padding=padding, groups=n).view(n, -1, height, width)


class SynthesisLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, w_dim: int, side: int, up: int = 1, grouped: bool = True) -> None:
        super().__init__()
        self.up, self.grouped = up, grouped
        self.affine = FullyConnected(w_dim, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3).to(memory_format=torch.channels_last))
        self.register_buffer("noise_const", torch.randn(side, side))
        self.noise_strength = nn.Parameter(torch.full((), 0.1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.up) if self.up > 1 else x
        x = modulate(x, self.weight, self.affine(w), True, self.grouped)
        return F.leaky_relu(x + self.noise_const * self.noise_strength + self.bias[:, None, None], 0.2) * math.sqrt(2)


class ToRGB(nn.Module):
    def __init__(self, inputs: int, w_dim: int) -> None:
        super().__init__()
        self.affine = FullyConnected(w_dim, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.weight_gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return modulate(x, self.weight, self.affine(w) * self.weight_gain, False, True) + self.bias[:, None, None]


class StyleGAN2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping = nn.Sequential(FullyConnected(6, 6, lr=0.01), nn.LeakyReLU(0.2), FullyConnected(6, 5, lr=0.01))
        self.const = nn.Parameter(torch.randn(8, 4, 4))
        self.b4, self.b4_rgb = SynthesisLayer(8, 8, 5, 4), ToRGB(8, 5)
        self.b8, self.b8_rgb = SynthesisLayer(8, 6, 5, 8, up=2, grouped=False), ToRGB(6, 5)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.b4(self.const.expand(len(z), -1, -1, -1), w)
        image = self.b4_rgb(x, w)
        return F.interpolate(image, scale_factor=2) + self.b8_rgb(self.b8(x, w), w)


# ------------------------------------------------------------------- in the manner of NVIDIA's StyleGAN3


class FourierInput(nn.Module):
    """Random Fourier features, turned by an affine of w, mixed by a raw (channels, channels) weight."""

    def __init__(self, channels: int, w_dim: int, side: int) -> None:
        super().__init__()
        self.affine = FullyConnected(w_dim, 2)
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.register_buffer("freqs", torch.randn(channels, 2))
        self.register_buffer("phases", torch.rand(channels))
        axis = torch.linspace(-0.5, 0.5, side)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1))

    def forward(self, w: Tensor) -> Tensor:
        grid = self.grid + self.affine(w)[:, None, None]
        features = torch.sin(2 * math.pi * (grid @ self.freqs.t() + self.phases))
        return (features @ self.weight.t() / math.sqrt(len(self.weight))).permute(0, 3, 1, 2)


class AliasFreeLayer(nn.Module):
    """The weight is normalised before modulation; the input is divided by a running magnitude."""

    def __init__(self, inputs: int, outputs: int, w_dim: int, kernel: int, torgb: bool = False) -> None:
        super().__init__()
        self.torgb = torgb
        self.affine = FullyConnected(w_dim, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("magnitude_ema", torch.ones([]))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if self.training:
            self.magnitude_ema.copy_(x.detach().square().mean().lerp(self.magnitude_ema, 0.999))
        styles, weight = self.affine(w), self.weight
        if not self.torgb:
            weight = weight * weight.square().mean((1, 2, 3), keepdim=True).rsqrt()
            styles = styles * styles.square().mean().rsqrt()
        x = modulate(x * self.magnitude_ema.rsqrt(), weight, styles, not self.torgb, True)
        x = x + self.bias[:, None, None]
        return x if self.torgb else F.leaky_relu(x, 0.2)


class StyleGAN3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input = FourierInput(6, 5, 8)
        self.L0, self.L1 = AliasFreeLayer(6, 8, 5, 3), AliasFreeLayer(8, 6, 5, 1)
        self.L2 = AliasFreeLayer(6, 3, 5, 1, torgb=True)

    def forward(self, w: Tensor) -> Tensor:
        return self.L2(self.L1(self.L0(self.input(w), w), w), w)


# ------------------------------------------------------------------- in the manner of rosinality's StyleGAN2


class EqualLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias_init: float = 0.0, lr_mul: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.full((outputs,), bias_init))
        self.scale, self.lr_mul = lr_mul / math.sqrt(inputs), lr_mul

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class EqualConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.padding = 1 / math.sqrt(inputs * kernel**2), kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class ModulatedConv2d(nn.Module):
    """The raw weight has its batch dimension in front: (1, out, in, k, k)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, w_dim: int, demodulate: bool = True, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))
        self.modulation = EqualLinear(w_dim, inputs, bias_init=1.0)
        self.scale, self.demodulate, self.up = 1 / math.sqrt(inputs * kernel**2), demodulate, up

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        n, inputs, height, width = x.shape
        weight = self.scale * self.weight * self.modulation(style).view(n, 1, inputs, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(n, -1, 1, 1, 1)
        x = x.reshape(1, n * inputs, height, width)
        if self.up:
            weight = weight.transpose(1, 2).flatten(0, 1)
            y = F.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=1, groups=n)
        else:
            y = F.conv2d(x, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=n)
        return y.view(n, -1, *y.shape[2:])


class RosinalityStyleGAN2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Sequential(EqualLinear(5, 5, lr_mul=0.01), nn.LeakyReLU(0.2))
        self.input = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.conv1, self.conv2 = ModulatedConv2d(8, 8, 3, 5), ModulatedConv2d(8, 6, 3, 5, up=True)
        self.to_rgb = ModulatedConv2d(6, 3, 1, 5, demodulate=False)
        self.refine = EqualConv2d(3, 3, 3)

    def forward(self, z: Tensor) -> Tensor:
        w = self.style(z)
        x = F.leaky_relu(self.conv1(self.input.repeat(len(z), 1, 1, 1), w), 0.2)
        return self.refine(self.to_rgb(F.leaky_relu(self.conv2(x, w), 0.2), w))


# ------------------------------------------------------------------- in the manner of BigGAN


class HandSpectral:
    """Spectral normalisation by hand: a mixin whose forward divides by a power-iterated singular value."""

    weight: Tensor
    u: Tensor
    training: bool

    def normalised(self) -> Tensor:
        matrix = self.weight.view(self.weight.size(0), -1)
        with torch.no_grad():
            v = F.normalize(matrix.t() @ self.u, dim=0, eps=1e-12)
            u = F.normalize(matrix @ v, dim=0, eps=1e-12)
            if self.training:
                self.u.copy_(u)
        return self.weight / (u @ matrix @ v)


class SNConv2d(HandSpectral, nn.Conv2d):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        nn.Conv2d.__init__(self, *arguments, **options)
        self.register_buffer("u", torch.randn(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class SNLinear(HandSpectral, nn.Linear):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        nn.Linear.__init__(self, *arguments, **options)
        self.register_buffer("u", torch.randn(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


class ConditionalBatchNorm(nn.Module):
    """Gain and bias from a shared class embedding."""

    def __init__(self, channels: int, y_dim: int) -> None:
        super().__init__()
        self.gain, self.bias = SNLinear(y_dim, channels, bias=False), SNLinear(y_dim, channels, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x) * (1 + self.gain(y))[:, :, None, None] + self.bias(y)[:, :, None, None]


class BigGAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(4, 5)
        self.linear = SNLinear(6, 8 * 16)
        self.bn1, self.conv1 = ConditionalBatchNorm(8, 5), SNConv2d(8, 8, 3, padding=1)
        self.bn2, self.conv2 = ConditionalBatchNorm(8, 5), nn.utils.spectral_norm(nn.Conv2d(8, 6, 3, padding=1))
        self.shortcut = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 6, 1))
        self.query, self.value = SNConv2d(6, 2, 1, bias=False), SNConv2d(6, 6, 1, bias=False)
        self.gamma = nn.Parameter(torch.full((), 0.5))
        self.output = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), SNConv2d(6, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        y = self.shared(torch.arange(len(z)) % 4)
        x = self.linear(z).view(-1, 8, 4, 4)
        up = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2)
        x = self.conv2(F.relu(self.bn2(self.conv1(up), y))) + self.shortcut(F.interpolate(x, scale_factor=2))
        query = self.query(x).flatten(2)
        attention = F.softmax(query.transpose(1, 2) @ query, -1)
        x = x + self.gamma * (self.value(x).flatten(2) @ attention.transpose(1, 2)).view_as(x)
        return torch.tanh(self.output(x))


# ------------------------------------------------------------------- in the manner of pix2pix and CycleGAN


class ResnetBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(True),
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def resnet_generator() -> nn.Module:
    return nn.Sequential(
        nn.ReflectionPad2d(3), nn.Conv2d(3, 4, 7), nn.InstanceNorm2d(4), nn.ReLU(True),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(True),
        ResnetBlock(8),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1), nn.InstanceNorm2d(4), nn.ReLU(True),
        nn.ReflectionPad2d(3), nn.Conv2d(4, 3, 7), nn.Tanh(),
    )  # fmt: skip


class UnetBlock(nn.Module):
    """One level of pix2pix's U-Net around an inner one."""

    def __init__(self, outer: int, inner: int, inside: nn.Module | None) -> None:
        super().__init__()
        down = [nn.LeakyReLU(0.2), nn.Conv2d(outer, inner, 4, 2, 1, bias=False)]
        up = [
            nn.ReLU(),
            nn.ConvTranspose2d(inner * (1 if inside is None else 2), outer, 4, 2, 1),
            nn.BatchNorm2d(outer),
        ]
        self.model = nn.Sequential(*down, *([] if inside is None else [inside]), *up)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


def unet_generator() -> nn.Module:
    return nn.Sequential(UnetBlock(3, 6, UnetBlock(6, 8, None)), nn.Conv2d(6, 3, 1))


# ------------------------------------------------------------------- in the manner of HiFi-GAN


class HiFiGAN(nn.Module):
    def __init__(self, weight_norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.conv_pre = weight_norm(nn.Conv1d(5, 8, 7, 1, padding=3))
        self.ups = nn.ModuleList([weight_norm(nn.ConvTranspose1d(8 >> i, 4 >> i, 4, 2, padding=1)) for i in range(2)])
        self.resblocks = nn.ModuleList(
            [
                nn.ModuleList([weight_norm(nn.Conv1d(4 >> i, 4 >> i, 3, dilation=d, padding=d)) for d in (1, 3)])
                for i in range(2)
            ]
        )
        self.conv_post = weight_norm(nn.Conv1d(2, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for up, block in zip(self.ups, self.resblocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            for conv in block:
                x = conv(F.leaky_relu(x, 0.1)) + x
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


CONVS = (nn.Conv2d, nn.ConvTranspose2d)
CONVS_1D = (nn.Conv1d, nn.ConvTranspose1d)
FAMILIES = {
    "stylegan2": Family(StyleGAN2, (2, 6), (FullyConnected, SynthesisLayer, ToRGB)),
    "stylegan3": Family(StyleGAN3, (2, 5), (FullyConnected, FourierInput, AliasFreeLayer)),
    "rosinality": Family(RosinalityStyleGAN2, (2, 5), (EqualLinear, EqualConv2d, ModulatedConv2d)),
    "biggan": Family(BigGAN, (3, 6), (nn.Conv2d, nn.Linear)),
    "cyclegan": Family(resnet_generator, (2, 3, 16, 16), CONVS),
    "pix2pix": Family(unet_generator, (2, 3, 16, 16), CONVS),
    "hifigan": Family(lambda: HiFiGAN(nn.utils.parametrizations.weight_norm), (2, 5, 6), CONVS_1D),
    "hifigan_old": Family(lambda: HiFiGAN(nn.utils.weight_norm), (2, 5, 6), CONVS_1D),
}  # fmt: skip


def build(family: str) -> tuple[nn.Module, Tensor]:
    """The same network and input each time: float64, in eval mode."""
    torch.manual_seed(3)
    net = FAMILIES[family].build().double()
    x = torch.randn(FAMILIES[family].inputs, dtype=torch.float64)
    net(x), net(x)  # running statistics and singular vectors settle a little
    return net.eval(), x
