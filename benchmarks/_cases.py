"""The networks that are measured, and the ways to train each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convlora
from convlora.integrations import eg3d, stylegan2
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.stylegan2.generator import SynthesisNetwork


class Case(NamedTuple):
    """A network with random weights and the input (N, …) that it gets; `bench` makes one of a batch size."""

    network: nn.Module
    x: Tensor


class BackboneAndSR(nn.Module):
    """EG3D without its renderer: latents ws (N, num_ws, w_dim) -> image (N, 3, R, R).

    The super-resolution gets, instead of rendered features, the mean of the three planes at its own resolution: so
    every layer that an adapter trains has its full size and a gradient.
    """

    def __init__(self, G: TriPlaneGenerator) -> None:
        super().__init__()
        self.synthesis, self.superresolution = G.backbone.synthesis, G.superresolution
        self.channels = G.plane_channels

    def forward(self, ws: Tensor) -> Tensor:
        planes = self.synthesis(ws, noise_mode="const").unflatten(1, (3, self.channels))
        side = self.superresolution.input_resolution
        features = F.interpolate(planes.mean(1), size=(side, side), mode="bilinear", align_corners=False)
        return self.superresolution(features[:, :3], features, ws, noise_mode="none")


class Synthesis(nn.Module):
    """A StyleGAN2 synthesis network with its constant noise: ws (N, num_ws, w_dim) -> image (N, 3, R, R)."""

    def __init__(self, network: SynthesisNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, ws: Tensor) -> Tensor:
        return self.network(ws, noise_mode="const")


def dcgan(side: int = 64, width: int = 64, z_dim: int = 100) -> nn.Sequential:
    """DCGAN's generator (https://arxiv.org/abs/1511.06434): z (N, z_dim, 1, 1) -> image (N, 3, side, side)."""
    channels = width * side // 8
    layers: list[nn.Module] = [nn.ConvTranspose2d(z_dim, channels, 4, bias=False)]
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    while channels > width:
        layers += [nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(channels // 2), nn.ReLU()]
        channels //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh()).eval()


def plain(channels: int, depth: int = 4) -> nn.Sequential:
    """3×3 convolutions with ReLU between them: x (N, channels, H, W) -> the same shape."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _eg3d(config: str) -> Callable[[int], Case]:
    def build(batch: int) -> Case:
        G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS[config]).eval()
        return Case(BackboneAndSR(G), torch.randn(batch, G.num_ws, G.w_dim))

    return build


def _stylegan2(config: str) -> Callable[[int], Case]:
    def build(batch: int) -> Case:
        G = stylegan2.Generator(**stylegan2.CONFIGS[config]).eval()
        return Case(Synthesis(G.synthesis), torch.randn(batch, G.num_ws, G.w_dim))

    return build


def _plain(channels: int, side: int) -> Callable[[int], Case]:
    return lambda batch: Case(plain(channels), torch.randn(batch, channels, side, side))


NETWORKS: dict[str, Callable[[int], Case]] = {
    "eg3d": _eg3d("ffhq512-128"),
    "eg3d-lab": _eg3d("lab"),
    "stylegan2-256": _stylegan2("paper256"),
    "stylegan2-512": _stylegan2("paper512"),
    "stylegan2-1024": _stylegan2("paper1024"),
    "dcgan": lambda batch: Case(dcgan(), torch.randn(batch, 100, 1, 1)),
}
PLAIN: dict[str, Callable[[int], Case]] = {
    "512ch-16": _plain(512, 16),
    "256ch-32": _plain(256, 32),
    "128ch-64": _plain(128, 64),
    "16ch-8": _plain(16, 8),
    "dcgan": NETWORKS["dcgan"],
}

# ---- the ways to train


def frozen(network: nn.Module, rank: int) -> nn.Module:
    return copy.deepcopy(network).requires_grad_(False)


def full(network: nn.Module, rank: int) -> nn.Module:
    return copy.deepcopy(network).requires_grad_(True)


def lora(network: nn.Module, rank: int) -> nn.Module:
    return _adapted(network, rank, "auto")


def materialised(network: nn.Module, rank: int) -> nn.Module:
    """`W₀ + B·A` is formed and differentiated through, as in My3DGen's code."""
    return _adapted(network, rank, "weight")


def _adapted(network: nn.Module, rank: int, path: convlora.paths.Path) -> nn.Module:
    """LoRA on every layer, of `rank` or, where a layer has not that many channels, of its limit; B is not zero."""
    model = copy.deepcopy(network)
    limits = {row.name: row.max_rank for row in convlora.adaptable(model) if row.max_rank < rank}
    randomize(convlora.inject_lora(model, rank, ranks=limits, path=path).parameters())
    return model


def randomize(parameters: Iterable[nn.Parameter], std: float = 0.02) -> None:
    """Values that training could have given: a B of zeros would be less than the arithmetic of a real step."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=std)


VARIANTS: Mapping[str, Callable[[nn.Module, int], nn.Module]] = {
    "frozen": frozen,
    "full": full,
    "lora": lora,
    "materialised": materialised,
}


def step(model: nn.Module, x: Tensor) -> None:
    """One training step without its optimiser: forward, and backward of the output's mean square.

    The input needs a gradient, in every variant. So all of the network's backward runs in all of them; for a
    synthesis network with frozen weights this is a step of inverting photos.
    """
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    model(x).square().mean().backward()


def trainables(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
