"""Two small networks trained on the procedural world: a perceptual net and an identity encoder.

The perceptual net regresses the parameters of a head from a photo; its features give a distance in the
manner of LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
2018), without LPIPS' learned weights. The identity encoder is a small residual network trained to tell pairs of
photos of one person from all others in a batch (Khosla et al., "Supervised Contrastive Learning", 2020), on people
whose expression, light, hair and pose vary.
Both were trained on drawings of the lab only and know nothing about photographs of real people.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora import files as adapter_files
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.lab._species import PEOPLE, Species
from convlora.integrations.eg3d.lab._species import species as species_of

PARTS = ("perceptual", "identity")


class PerceptualNet(nn.Module):
    """A plain convolution stack, a head for the world's parameters and one for the camera's angles.

    Images are (N, 3, R, R) in [-1, 1] with R of 32 or more. Labels are the 25 camera numbers of EG3D: knowing
    the pose, the head can tell a turned face from an asymmetric one.
    """

    def __init__(
        self,
        param_dim: int,
        widths: Sequence[int] = (24, 48, 96, 128, 128),
        depths: Sequence[int] = (1, 1, 1, 1, 1),
        head: int = 256,
    ):
        super().__init__()
        self.config = {"param_dim": param_dim, "widths": list(widths), "depths": list(depths), "head": head}
        self.stages = nn.ModuleList(
            _stage(i, o, depth) for i, o, depth in zip((3, *widths[:-1]), widths, depths, strict=True)
        )
        self.squeeze = nn.Conv2d(widths[-1], 48, 1)
        self.hidden = nn.Linear(48 * 16, head)
        self.camera = nn.Linear(head, 2)
        self.params = nn.Linear(head + 12, param_dim)
        self.mix = nn.Linear(head + 12, head)

    def features(self, images: Tensor) -> list[Tensor]:
        """The activations of every stage, finest first: `(N, width, R / 2^stage, R / 2^stage)`."""
        x, out = images, []
        for index, stage in enumerate(self.stages):
            x = stage(F.avg_pool2d(x, 2) if index else x)
            out.append(x)
        return out

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the world's parameters (N, param_dim) and of (yaw, pitch) in radians (N, 2)."""
        top = F.adaptive_avg_pool2d(F.leaky_relu(self.squeeze(self.features(images)[-1]), 0.1), 4)
        hidden = F.leaky_relu(self.hidden(top.flatten(1)), 0.1)
        pose = labels.to(hidden)[:, :16].view(-1, 4, 4)[:, :3].flatten(1)
        known = torch.cat([hidden, pose], 1)
        mixed = F.leaky_relu(self.mix(known), 0.1)
        return self.params(torch.cat([mixed, pose], 1)), self.camera(hidden)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance (N,) between two batches of images of one size, 0 for equal ones."""
        return features_distance(self.features(a), self.features(b))


def _stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """`depth` 3×3 convolutions, each followed by a leaky ReLU."""
    layers: list[nn.Module] = []
    for index in range(depth):
        conv = nn.Conv2d(outputs if index else inputs, outputs, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, a=0.1)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        layers += [conv, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Two 3×3 convolutions with batch normalisation and a shortcut; halves the resolution if asked."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv0 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm0 = nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if (inputs, stride) != (outputs, 1) else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(F.relu(self.norm0(self.conv0(x)))))
        if self.skip is not None:
            x = self.skip(F.avg_pool2d(x, 2) if self.stride == 2 else x)
        return F.relu(x + y)


class IdentityEncoder(nn.Module):
    """Unit embeddings (N, 128) of photos (N, 3, R, R) in [-1, 1]; two photos are compared by their dot product.

    Any R from 64 up is averaged down to 64. `describe` also returns an estimate of the `factors` numbers that make
    a person in the lab's world, which steers the training and is not used for verification.
    """

    size = 64

    def __init__(self, factors: int, widths: Sequence[int] = (32, 48, 96, 160), embedding: int = 128):
        super().__init__()
        self.config = {"factors": factors, "widths": list(widths), "embedding": embedding}
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks = [Residual(widths[0], widths[0])]
        for inputs, outputs in zip(widths, widths[1:]):
            blocks += [Residual(inputs, outputs, 2), Residual(outputs, outputs)]
        self.blocks = nn.Sequential(*blocks)
        self.squeeze = nn.Conv2d(widths[-1], 64, 1)
        self.embed = nn.Linear(64 * 16, embedding)
        self.factors = nn.Linear(embedding, factors)

    def raw(self, images: Tensor) -> Tensor:
        """Embeddings before they are scaled to unit length."""
        if images.shape[-1] != self.size or images.shape[-2] != self.size:
            images = F.adaptive_avg_pool2d(images, self.size)
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.embed(F.relu(self.squeeze(x)).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.raw(images).float(), dim=1)

    def describe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings (N, 128) and estimated factors of the person (N, factors)."""
        raw = self.raw(images).float()
        return F.normalize(raw, dim=1), self.factors(raw)


def features_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Mean over stages of the squared difference of channel-normalised features, averaged over positions.

    Pass the features of a fixed target once and reuse them: that halves the cost inside an optimisation.
    """
    total: Tensor | float = 0.0
    for x, y in zip(a, b, strict=True):
        total = total + (_unit(x) - _unit(y)).square().sum(1).mean((1, 2))
    assert isinstance(total, Tensor)
    return total / len(a)


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(1, keepdim=True) + 1e-4).rsqrt()


def perceptual_distance(
    a: Tensor, b: Tensor, net: PerceptualNet | None = None, species: str | Species = "people"
) -> Tensor:
    """The lab's perceptual distance (N,) of images (N, 3, R, R) in [-1, 1], with the shipped net by default."""
    if a.shape != b.shape:
        raise ConvloraError(f"images to compare must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}")
    return (net or _perceptual(a.device, species)).distance(a, b)


def encode(
    images: Tensor, labels: Tensor, net: PerceptualNet | None = None, species: str | Species = "people"
) -> Tensor:
    """Estimate the world's parameters (N, param_dim) from photos and their labels (N, 25): a start for inversion."""
    if images.shape[-1] > 128:
        images = F.adaptive_avg_pool2d(images, 128)
    return (net or _perceptual(images.device, species))(images, labels)[0]


_BUILD: dict[str, type[nn.Module]] = {"perceptual": PerceptualNet, "identity": IdentityEncoder}
_LOADED: dict[tuple[str, str, str], nn.Module] = {}


def _perceptual(device: torch.device, species: str | Species) -> PerceptualNet:
    net = load("perceptual", device, species=species)
    assert isinstance(net, PerceptualNet)
    return net


def file_name(part: str, species: str | Species = "people") -> str:
    """The name of a species' network or prior in the package's data, without its suffix."""
    kind = species_of(species)
    return part if kind is PEOPLE else f"{part}_{kind.name}"


def load(
    part: str,
    device: torch.device | str = "cpu",
    path: str | Path | None = None,
    species: str | Species = "people",
) -> nn.Module:
    """The frozen "perceptual" or "identity" net in eval mode, from the package or from `path`; cached per device."""
    if part not in PARTS:
        raise ConvloraError(f"the lab has no network {part!r}; choose one of {', '.join(PARTS)}")
    name = file_name(part, species)
    key = (part, name, str(torch.device(device)))
    if path is None and key in _LOADED:
        return _LOADED[key]
    net = read(part, Path(path) if path else Path(str(files(__package__) / "data" / f"{name}.safetensors")))
    net = net.to(device).eval().requires_grad_(False)
    if path is None:
        _LOADED[key] = net
    return net


def read(part: str, path: Path) -> nn.Module:
    """Build the network named in the file's metadata and fill it; weights stored as float16 become float32."""
    if not path.is_file():
        raise FileError(f"no {part} net at {path}; train it with `python -m {__package__}.train_networks {part}`")
    state, metadata = adapter_files.read(path)
    config = json.loads(metadata.get("config", "{}"))
    if "widths" not in config:
        raise FileError(f"{path} carries no network configuration; it was not written by the lab's training")
    build: Any = _BUILD[part]
    net: nn.Module = build(**config)
    net.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    return net


def save(net: nn.Module, path: Path) -> None:
    """Write a network as float16 safetensors with its configuration; the file appears whole or not at all."""
    state = {name: adapter_files.cast(tensor, torch.float16) for name, tensor in net.state_dict().items()}
    adapter_files.write(path, state, {"config": json.dumps(net.config)})
