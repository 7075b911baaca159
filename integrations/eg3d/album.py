"""Albums: a folder of aligned photos with EG3D's own dataset.json, checked before anything long starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import AlbumError
from convlora.integrations.eg3d.images import load_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Photos:
    """images (N, 3, R, R) in [-1, 1], labels (N, 25), and the N file names they came from."""

    images: Tensor
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> Photos:
        return Photos(self.images[:count], self.labels[:count], self.names[:count])

    def to(self, device: torch.device | str) -> Photos:
        return Photos(self.images.to(device), self.labels.to(device), self.names)


@dataclass
class Album:
    """The photos of one person: `train` to personalise with, `test` held out."""

    folder: Path
    person: str
    procedural: bool
    train: Photos
    test: Photos


def load_album(folder: str | Path, resolution: int, held_out: int = 0) -> Album:
    """Read an album at `resolution` (photos must be square and at least that large).

    The folder holds photos (png, jpg, webp; RGB), `dataset.json` with a camera label for each as EG3D writes
    it, `{"labels": [["photo.png", [25 numbers]], …]}`, and optionally `manifest.json` with `person`,
    `procedural` and `split: {"train": [...], "test": [...]}`. Without a split, every ⌊N / held_out⌋-th photo
    in name order is held out.

    Raises `AlbumError`: no photos, no or damaged dataset.json, a photo without a camera or the reverse,
    unreadable, non-RGB, non-square or too small photos, labels that are not 25 finite numbers.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AlbumError(f"no album folder at {folder}")
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise AlbumError(f"{folder} holds no photos ({', '.join(SUFFIXES)})")
    labels = _read_labels(folder, files)
    manifest = _read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    train, test = _split(folder, files, manifest, held_out)
    photos = {name: _read_photo(folder / name, resolution) for name in train + test}

    def collect(names: list[str]) -> Photos:
        if not names:
            return Photos(torch.empty(0, 3, resolution, resolution), torch.empty(0, 25), [])
        return Photos(torch.stack([photos[n] for n in names]), torch.tensor([labels[n] for n in names]), names)

    person, procedural = str(manifest.get("person", folder.name)), bool(manifest.get("procedural", False))
    return Album(folder, person, procedural, collect(train), collect(test))


def _read_labels(folder: Path, files: list[str]) -> dict[str, list[float]]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise AlbumError(f"{folder} has no dataset.json with the cameras of its {len(files)} photos")
    entries = _read_json(path).get("labels")
    if not isinstance(entries, list):
        raise AlbumError(f'{path} has no "labels": [["photo.png", [25 numbers]], …]')
    labels: dict[str, list[float]] = {}
    for entry in entries:
        try:
            name, numbers = str(entry[0]), [float(x) for x in entry[1]]
        except (TypeError, ValueError, IndexError, KeyError):
            raise AlbumError(f"{path}: this entry is not [file, [25 numbers]]: {str(entry)[:80]}") from None
        if len(numbers) != 25 or not all(math.isfinite(x) for x in numbers):
            raise AlbumError(f"{path}: {name} has {len(numbers)} camera numbers; 25 finite ones are needed (16 + 9)")
        labels[name] = numbers
    without_camera = [name for name in files if name not in labels]
    without_photo = [name for name in labels if name not in files]
    if without_camera:
        raise AlbumError(f"{path} has no camera for {_listing(without_camera)}: add its label or take the photo out")
    if without_photo:
        raise AlbumError(f"{path} names {_listing(without_photo)}, not in {folder}: add the photo or drop the entry")
    return labels


def _split(folder: Path, files: list[str], manifest: dict, held_out: int) -> tuple[list[str], list[str]]:
    split = manifest.get("split")
    if split is not None:
        train, test = list(split.get("train", [])), list(split.get("test", []))
        unknown = [name for name in train + test if name not in files]
        if unknown:
            raise AlbumError(f"{folder / 'manifest.json'} splits {_listing(unknown)}, not in the folder")
    else:
        if not 0 <= held_out < len(files):
            raise AlbumError(f"held_out={held_out} of {len(files)} photos leaves nothing to personalise with")
        test = files[:: max(1, len(files) // held_out)][:held_out] if held_out else []
        train = [name for name in files if name not in test]
    if not train:
        raise AlbumError(f"{folder} has no training photos")
    return train, test


def _read_photo(path: Path, resolution: int) -> Tensor:
    image = load_rgb(path)
    height, width = image.shape[-2:]
    if height != width:
        raise AlbumError(f"{path} is {width} × {height}; photos must be square crops aligned as EG3D does")
    if height < resolution:
        raise AlbumError(f"{path} is {width} × {height}; this generator needs at least {resolution} × {resolution}")
    return resize(image[None], resolution)[0]


def resize(images: Tensor, resolution: int) -> Tensor:
    """Antialiased bilinear resizing, as the losses compare with image_raw; (N, 3, R, R) -> (N, 3, r, r)."""
    if images.shape[-1] == resolution:
        return images
    size = (resolution, resolution)
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise AlbumError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise AlbumError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _listing(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
