"""Networks by name: where their weights are, read and checked, ready to be called."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.errors import ConvloraError, FileError
from convlora.integrations import weights as published
from convlora.integrations.eg3d.metrics.arcface import Align, ArcFace, aligned, check_align
from convlora.integrations.eg3d.metrics.dists import DISTS
from convlora.integrations.eg3d.metrics.lpips import LPIPS
from convlora.integrations.eg3d.metrics.state import fill, named, read_state

Paths = str | Path | Sequence[str | Path]

#: perceptual distance -> what builds its network, and the names in the registry that its weights have
_PERCEPTUAL: dict[str, tuple[Callable[[], LPIPS | DISTS], tuple[str, str]]] = {
    "lpips_alex": (partial(LPIPS, "alex"), ("alexnet", "lpips_alex")),
    "lpips_vgg": (partial(LPIPS, "vgg"), ("vgg16", "lpips_vgg")),
    "lpips_squeeze": (partial(LPIPS, "squeeze"), ("squeezenet1_1", "lpips_squeeze")),
    "dists": (DISTS, ("vgg16", "dists")),
}
_LAB = {"lab": "people", "lab-cats": "cats"}  # the lab's networks, by the species they know
PERCEPTUAL = (*_PERCEPTUAL, *_LAB)
IDENTITY = ("arcface_ir101", "arcface_ir_se50", *_LAB)

# the whole networks of the packages lpips and DISTS-pytorch keep the trunk's numbers behind their own names
_WHOLE = ((r"^net\.slice\d+\.", "features."), (r"^stage\d+\.", "features."))


@dataclass(frozen=True)
class PerceptualDistance:
    """A loaded perceptual distance; called with images (N, 3, R, R) in [-1, 1] twice, it gives (N,).

    Where one side stays the same, keep its `features` and call `distance(features(a), kept)`. Gradients flow into
    images alone. Images may be on any device; the result is on the network's.

    Attributes:
        source: the files its weights are from.
        sha256: their digests, in the same order.
    """

    name: str
    features: Callable[[Tensor], list[Tensor]] = field(repr=False)
    distance: Callable[[list[Tensor], list[Tensor]], Tensor] = field(repr=False)
    source: tuple[str, ...]
    sha256: tuple[str, ...]

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            raise ConvloraError(f"{self.name} compares images of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
        return self.distance(self.features(a), self.features(b))


@dataclass(frozen=True)
class IdentityNetwork:
    """A loaded identity encoder: images (N, 3, R, R) in [-1, 1] to unit vectors (N, D), on the network's device.

    `landmarks` (N, 5, 2) in pixels belong to `align="5pt"`, see `aligned`. Cosines of "pool" and "center_crop" are
    not those of face verification, whose pictures are aligned.
    """

    name: str
    align: Align
    embed: Callable[[Tensor, Tensor | None], Tensor] = field(repr=False)
    source: tuple[str, ...]
    sha256: tuple[str, ...]

    def __call__(self, images: Tensor, landmarks: Tensor | None = None) -> Tensor:
        if landmarks is not None and self.align != "5pt":
            raise ConvloraError(f'landmarks are used with align="5pt" only; {self.name} has align={self.align!r}')
        return self.embed(images, landmarks)


def load_perceptual(name: str, path: Paths | None = None, device: torch.device | str = "cpu") -> PerceptualDistance:
    """The perceptual distance `name`, one of `PERCEPTUAL`, or "name:PATH".

    `path`: a file or several, or a folder with files of the published names. A file may be the trunk
    (torchvision's `.pth`), the heads (`lpips`' or DISTS'), both in one, or a whole `lpips.LPIPS` or `DISTS` state
    dict, in `.pth` or `.safetensors`. What they lack, and all of it without a path, comes from
    `convlora.integrations.weights`.

    Raises:
        ConvloraError: no such name.
        FileError: a file is missing or damaged, or its tensors do not fit.
        HubError: weights are neither here nor can they be fetched; the message says how to bring them.
    """
    name, path = _split(name, path, PERCEPTUAL)
    if name in _LAB:
        return _lab_perceptual(name, path, torch.device(device))
    build, parts = _PERCEPTUAL[name]
    net = build()
    heads = [key for key in net.state_dict() if not key.startswith("features.")]
    needs = {parts[0]: [key for key in net.state_dict() if key not in heads], parts[1]: heads}
    source, digests = _fill(net, needs, path)
    net.to(device)
    return PerceptualDistance(name, net.features, net.distance, source, digests)


def load_identity(
    name: str, path: Paths | None = None, device: torch.device | str = "cpu", align: Align = "pool"
) -> IdentityNetwork:
    """The identity encoder `name`, one of `IDENTITY`, or "name:PATH"; `align` is how faces are cut out, see `aligned`.

    `path`: the `.pth` or `.safetensors`, or a folder with the published one. "lab" knows "pool" only: its heads are
    drawn in place.

    Raises: as `load_perceptual`.
    """
    check_align(align)
    name, path = _split(name, path, IDENTITY)
    if name in _LAB:
        if align != "pool":
            raise ConvloraError(f'the lab\'s identity net takes whole images: align must be "pool", not {align!r}')
        return _lab_identity(name, path, torch.device(device))
    net = ArcFace(name)
    keys = [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]
    source, digests = _fill(net, {name: keys}, path)
    net.to(device)

    def embed(images: Tensor, landmarks: Tensor | None) -> Tensor:
        return F.normalize(net(aligned(images.to(device, torch.float32), align, landmarks)), dim=1)

    return IdentityNetwork(name, align, embed, source, digests)


def described(network: object) -> str:
    """A network and its weights for a report: its name, and each file with its SHA-256; "" for a plain function."""
    if not isinstance(network, PerceptualDistance | IdentityNetwork):
        return ""
    align = f", align {network.align}" if isinstance(network, IdentityNetwork) and network.name not in _LAB else ""
    weights = ", ".join(
        f"{Path(file).name} SHA-256 {digest}" for file, digest in zip(network.source, network.sha256, strict=True)
    )
    return f"{network.name}{align} ({weights})"


def _split(name: str, path: Paths | None, names: Sequence[str]) -> tuple[str, Paths | None]:
    name, colon, behind = name.partition(":")
    if name not in names:
        raise ConvloraError(f"no network called {name!r}; there are {', '.join(names)}")
    if colon and path is not None:
        raise ConvloraError(f"{name} got two paths, {behind!r} in its name and {path!r}: give one")
    if colon and not behind:
        raise ConvloraError(f'"{name}:" names no path: leave the colon out, or put a file or folder behind it')
    return name, behind if colon else path


def _fill(net: nn.Module, needs: dict[str, list[str]], path: Paths | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fill `net`: for each registry name its keys, from the given files or the registry; returns files and digests."""
    keys = [key for part in needs.values() for key in part]
    state: dict[str, Tensor] = {}
    used: list[Path] = []
    for file in _files(path, needs):
        found = named(read_state(file), keys, _WHOLE)
        if not found:
            raise FileError(f"{file} holds none of the tensors of {' and '.join(needs)}: it is of another network")
        state |= found
        used.append(file)
    for part, wanted in needs.items():
        if not any(key in state for key in wanted):
            file = _registered(part)
            state |= named(read_state(file), wanted)
            used.append(file)
    fill(net, state, " with ".join(str(file) for file in used))
    return tuple(str(file) for file in used), tuple(published.digest(file) for file in used)


def brought(part: str) -> Path | None:
    """The file of these registered weights in the folder that CONVLORA_WEIGHTS names, if it is there."""
    folder = os.environ.get("CONVLORA_WEIGHTS")
    file = Path(folder, _file_name(part)) if folder else None
    return file if file is not None and file.is_file() else None


def _registered(part: str) -> Path:
    here = brought(part)
    if here is not None and published.REGISTRY[part].source is None:
        return here
    return published.weights(part)


def _file_name(part: str) -> str:
    """The name that the file of these registered weights has where it is published."""
    source = published.REGISTRY[part].source
    return source.rpartition("/")[2] if source else "model_ir_se50.pth"  # the only one without an address


def _files(path: Paths | None, needs: Iterable[str]) -> list[Path]:
    if path is None:
        return []
    paths = [path] if isinstance(path, str | Path) else list(path)
    if len(paths) == 1 and Path(paths[0]).is_dir():
        names = [_file_name(part) for part in needs]
        found = [Path(paths[0], name) for name in names if Path(paths[0], name).is_file()]
        if not found:
            raise FileError(f"{paths[0]} holds none of {', '.join(names)}: put them there, or give the file itself")
        return found
    return [published.locate(each) for each in paths]


def _lab_perceptual(name: str, path: Paths | None, device: torch.device) -> PerceptualDistance:
    from convlora.integrations.eg3d.lab import networks as lab

    file = _lab_file(lab.file_name("perceptual", _LAB[name]), path)
    net = lab.load("perceptual", device, None if path is None else file, _LAB[name])
    assert isinstance(net, lab.PerceptualNet)
    features = net.features
    return PerceptualDistance(
        name,
        lambda images: features(images.to(device)),
        lab.features_distance,
        (str(file),),
        (published.digest(file),),
    )


def _lab_identity(name: str, path: Paths | None, device: torch.device) -> IdentityNetwork:
    from convlora.integrations.eg3d.lab import networks as lab

    file = _lab_file(lab.file_name("identity", _LAB[name]), path)
    net = lab.load("identity", device, None if path is None else file, _LAB[name])
    return IdentityNetwork(
        name, "pool", lambda images, _: net(images.to(device)), (str(file),), (published.digest(file),)
    )


def _lab_file(part: str, path: Paths | None) -> Path:
    if path is None:
        return Path(str(files("convlora.integrations.eg3d.lab") / "data" / f"{part}.safetensors"))
    if not isinstance(path, str | Path):
        raise ConvloraError(f"the lab's {part} net is one file, got {len(path)} paths")
    return Path(path)
