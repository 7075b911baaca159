"""DISTS: Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", TPAMI 2020."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.integrations.eg3d.metrics import backbones
from convlora.integrations.eg3d.metrics.backbones import Stages

WIDTHS = (3, 64, 128, 256, 512, 512)  # the image itself and five stages of VGG16
_SMALL = 1e-6  # c₁ and c₂


class L2Pool(nn.Module):
    """Halves a picture: the root of the squares' average under a 3×3 Hann window."""

    kernel: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        window = torch.hann_window(5, periodic=False)[1:-1]
        kernel = torch.outer(window, window)
        self.register_buffer("kernel", (kernel / kernel.sum()).expand(width, 1, 3, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (F.conv2d(x.square(), self.kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class DISTS(nn.Module):
    """The distance: 0 for equal images, at most about 1. Keys: torchvision's for VGG16, and `alpha`, `beta`.

    Its authors resize pictures to a shorter side of 256 before they measure; nothing is resized here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = Stages(backbones.vgg16(L2Pool), (3, 8, 15, 22, 29), 16, image_too=True)
        self.alpha = nn.Parameter(torch.full((1, sum(WIDTHS), 1, 1), 0.1))
        self.beta = nn.Parameter(torch.full((1, sum(WIDTHS), 1, 1), 0.1))
        self.eval().requires_grad_(False)

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """(N,): one minus the weighted likeness of two lists of stages, by means (texture) and covariances."""
        weights = torch.cat([self.alpha, self.beta]).flatten(1)
        similarity = torch.zeros(len(a[0]), device=weights.device)
        for x, y, (alpha, beta) in zip(a, b, (weights / weights.sum()).split(WIDTHS, 1), strict=True):
            mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
            var_x, var_y = x.var((2, 3), correction=0), y.var((2, 3), correction=0)
            covariance = (x * y).mean((2, 3)) - mean_x * mean_y
            texture = (2 * mean_x * mean_y + _SMALL) / (mean_x.square() + mean_y.square() + _SMALL)
            structure = (2 * covariance + _SMALL) / (var_x + var_y + _SMALL)
            similarity = similarity + texture @ alpha + structure @ beta
        return 1 - similarity
