"""Files named and laid out as published ones are, with deterministic numbers in them; no real weight is in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from vectors import det

# the features of torchvision's checkpoints up to what the metrics read: position -> (outputs, inputs, kernel side)
ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
VGG16 = dict(
    zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        [
            (64, 3, 3), (64, 64, 3), (128, 64, 3), (128, 128, 3), (256, 128, 3), (256, 256, 3), (256, 256, 3),
            (512, 256, 3), (512, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 3),
        ],
    )
)  # fmt: skip
# position -> (inputs, squeezed, expanded) of SqueezeNet 1.1's fire modules
FIRES = {
    3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128),
    9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256),
}  # fmt: skip
HEADS = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}


def shapes_of(net: str) -> dict[str, tuple[int, ...]]:
    """Key and shape of a trunk's tensors as torchvision names them."""
    found: dict[str, tuple[int, ...]] = {}
    convs = {"alex": ALEXNET, "vgg": VGG16, "squeeze": {0: (64, 3, 3)}}[net]
    for position, (outputs, inputs, side) in convs.items():
        found[f"features.{position}.weight"] = (outputs, inputs, side, side)
        found[f"features.{position}.bias"] = (outputs,)
    for position, (inputs, squeezed, expanded) in FIRES.items() if net == "squeeze" else ():
        for part, shape in (
            ("squeeze", (squeezed, inputs, 1, 1)), ("expand1x1", (expanded, squeezed, 1, 1)),
            ("expand3x3", (expanded, squeezed, 3, 3)),
        ):  # fmt: skip
            found[f"features.{position}.{part}.weight"] = shape
            found[f"features.{position}.{part}.bias"] = shape[:1]
    return found


def trunk(net: str) -> dict[str, Tensor]:
    """A trunk's state dict: weights that keep the size of activations, from the recipe of the reference vectors."""
    return {
        key: det(f"{net}.{key}", shape, math.sqrt(2 / math.prod(shape[1:])) if len(shape) == 4 else 0.05)
        for key, shape in shapes_of(net).items()
    }


def heads(net: str) -> dict[str, Tensor]:
    """LPIPS' linear heads: not negative, as the real ones."""
    return {
        f"lin{k}.model.1.weight": det(f"{net}.lin{k}", (1, width, 1, 1), 0.1).abs()
        for k, width in enumerate(HEADS[net])
    }


def dists_heads() -> dict[str, Tensor]:
    return {name: det(f"dists.{name}", (1, 1475, 1, 1), 0.05, 0.1).abs() for name in ("alpha", "beta")}


def images(side: int = 64) -> tuple[Tensor, Tensor]:
    """Two batches (2, 3, side, side) in [-1, 1]: coarse patterns with noise, the second a distorted first."""
    coarse = torch.nn.functional.interpolate(det("coarse", (2, 3, 8, 8)), (side, side), mode="bilinear")
    first = (coarse + 0.2 * det("fine", (2, 3, side, side))).tanh()
    second = (0.8 * first.roll(1, -1) + 0.15 * det("other", (2, 3, side, side)) + 0.1).clamp(-1, 1)
    return first, second


def save(path: Path, state: Mapping[str, Tensor]) -> Path:
    torch.save(dict(state), path)
    return path
