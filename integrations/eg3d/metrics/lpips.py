"""LPIPS 0.1: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.

Equation 1 of the paper: unit-normalise every position's features over channels, square the differences, weight the
channels, average over positions, add up over stages. My3DGen trains and measures with `alex`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.metrics import backbones
from convlora.integrations.eg3d.metrics.backbones import Stages

Net = Literal["alex", "vgg", "squeeze"]


class _Trunk(NamedTuple):
    layers: list[nn.Module]
    taps: tuple[int, ...]
    widths: tuple[int, ...]
    least: int


def _trunk(net: Net) -> _Trunk:
    if net == "alex":
        return _Trunk(backbones.alexnet(), (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31)
    if net == "vgg":
        return _Trunk(backbones.vgg16(), (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16)
    if net != "squeeze":
        raise ConvloraError(f'LPIPS has the nets "alex", "vgg" and "squeeze", not {net!r}')
    return _Trunk(backbones.squeezenet1_1(), (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512), 17)


class LPIPS(nn.Module):
    """The distance of one net. Its state dict has torchvision's keys of the trunk and the published keys of the heads.

    `features` turns images (N, 3, R, R) in [-1, 1] into a list of stages.
    """

    def __init__(self, net: Net = "alex") -> None:
        super().__init__()
        layers, taps, widths, least = _trunk(net)
        self.features = Stages(layers, taps, least)
        for index, width in enumerate(widths):
            # "model.1" in the published files, behind a dropout that only training needed
            head = nn.Module()
            head.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{index}", head)
        self.eval().requires_grad_(False)

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """(N,): the distance between two lists of stages from `features`."""
        total = torch.zeros(len(a[0]), device=a[0].device)
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            head = self.get_submodule(f"lin{index}.model")
            total = total + head((_unit(x) - _unit(y)).square()).mean((1, 2, 3))
        return total


def _unit(x: Tensor) -> Tensor:
    """Each position's features divided by their length plus 1e-10, as the published implementation has it.

    Where all are 0, which ReLUs do make, the square root has no finite gradient: 1e-20 under it, below what float32
    resolves beside any other length, keeps it finite.
    """
    return x / ((x.square().sum(1, keepdim=True) + 1e-20).sqrt() + 1e-10)
