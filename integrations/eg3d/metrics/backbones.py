"""The convolution stacks that perceptual distances read: AlexNet, VGG16 and SqueezeNet 1.1, up to their last tap.

Layers sit where torchvision's `features` has them, so `features.N.weight` of its checkpoints fits.
AlexNet: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014. VGG16: Simonyan &
Zisserman, 2015, configuration D. SqueezeNet: Iandola et al., 2016, version 1.1 of the authors' repository.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError

#: ImageNet's mean and standard deviation of RGB in [0, 1], which all three were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Stages(nn.Sequential):
    """Layers in a row; called with images (N, 3, R, R) in [-1, 1], it gives what some of them put out.

    Args:
        layers: their keys in the state dict are their positions.
        taps: positions whose outputs are returned, rising; the last one ends the stack.
        least: the side of the smallest images that reach the last tap.
        image_too: put the images themselves, in [0, 1], before the outputs.

    Raises:
        ConvloraError: the images are too small, or not (N, 3, R, R).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, layers: Sequence[nn.Module], taps: Sequence[int], least: int, image_too: bool = False) -> None:
        super().__init__(*layers[: taps[-1] + 1])
        self.taps, self.least, self.image_too = tuple(taps), least, image_too
        # not persistent: they are no part of the published files
        self.register_buffer("shift", 2 * torch.tensor(MEAN).view(3, 1, 1) - 1, persistent=False)
        self.register_buffer("scale", 2 * torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < self.least:
            got = tuple(images.shape)
            raise ConvloraError(f"this network needs images (N, 3, R, R) with R of {self.least} or more, got {got}")
        images = images.to(self.shift)
        x = (images - self.shift) / self.scale
        out = [(images + 1) / 2] if self.image_too else []
        for position, layer in enumerate(self):
            x = layer(x)
            if position in self.taps:
                out.append(x)
        return out


class Fire(nn.Module):
    """SqueezeNet's module: 1×1 to few channels, from there 1×1 and 3×3 side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.squeeze(x))
        return torch.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def alexnet() -> list[nn.Module]:
    return [
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip


def vgg16(pool: Callable[[int], nn.Module] = lambda width: nn.MaxPool2d(2)) -> list[nn.Module]:
    """`pool` makes what stands between two blocks, from their number of channels."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(pool(inputs))
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
    return layers


def squeezenet1_1() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return [
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(),
        Fire(64, 16, 64), Fire(128, 16, 64), pool(),
        Fire(128, 32, 128), Fire(256, 32, 128), pool(),
        Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    ]  # fmt: skip
