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
from convlora.integrations.eg3d.images import load_grey, load_rgb

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CONTACT_SHEET = "contact_sheet.png"  # what `prepare` writes beside the photos is none of them


@dataclass(frozen=True)
class Photos:
    """images (N, 3, R, R) in [-1, 1], labels (N, 25), and the N file names they came from.

    masks (N, 1, R, R) in [0, 1], or None: 1 where a pixel is the photo's own, 0 where alignment had to invent it
    because the crop reaches over the photo's edge. None is all ones.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> Photos:
        return self.part(slice(count))

    def part(self, which: slice | list[int]) -> Photos:
        masks = None if self.masks is None else self.masks[which]
        names = self.names[which] if isinstance(which, slice) else [self.names[i] for i in which]
        return Photos(self.images[which], self.labels[which], names, masks)

    def joined(self, more: Photos) -> Photos:
        """These and `more`."""
        masks = None
        if self.masks is not None or more.masks is not None:
            masks = torch.cat([torch.ones_like(p.images[:, :1]) if p.masks is None else p.masks for p in (self, more)])
        both = torch.cat([self.images, more.images]), torch.cat([self.labels, more.labels])
        return Photos(*both, self.names + more.names, masks)

    def to(self, device: torch.device | str) -> Photos:
        masks = None if self.masks is None else self.masks.to(device)
        return Photos(self.images.to(device), self.labels.to(device), self.names, masks)


@dataclass
class Album:
    """The photos of one person: `train` to personalise with, `test` held out.

    `consent` is what the album's manifest records of it. `face_model` names the landmarks that the labels were worked
    out from; None where they were not, or nothing is known of them.
    """

    folder: Path
    person: str
    procedural: bool
    train: Photos
    test: Photos
    consent: str = "not recorded"
    face_model: str | None = None

    @property
    def estimated_cameras(self) -> bool:
        """The labels are measurements, with errors."""
        return self.face_model is not None

    @property
    def photos(self) -> Photos:
        """All of them, training photos first."""
        return self.train.joined(self.test)


def load_album(folder: str | Path, resolution: int, held_out: int = 0) -> Album:
    """Read an album at `resolution` (photos must be square and at least that large).

    The folder holds photos (png, jpg, webp; RGB), `dataset.json` with a camera label for each as EG3D writes
    it, `{"labels": [["photo.png", [25 numbers]], …]}`, and optionally `manifest.json` with `person`, `consent`,
    `procedural`, `face_model` (the cameras were worked out from landmarks with it) and
    `split: {"train": [...], "test": [...]}`. Without a split, every ⌊N / held_out⌋-th photo in name order is held
    out. `masks/<photo name>.png`, 8-bit grey and of the photo's size, is black where the photo was padded.

    Raises `AlbumError`: no photos, no or damaged dataset.json, a photo without a camera or the reverse,
    unreadable, non-RGB, non-square or too small photos, labels that are not 25 finite numbers, a mask of another
    size or mode, all black, or of no photo.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AlbumError(f"no album folder at {folder}")
    inside = (path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    files = sorted(name for name in inside if name != CONTACT_SHEET)
    if not files:
        raise AlbumError(f"{folder} holds no photos ({', '.join(SUFFIXES)})")
    labels = _read_labels(folder, files)
    manifest = _read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    train, test = _split(folder, files, manifest, held_out)
    found = _find_masks(folder, files)
    photos, masks = {}, {}
    for name in train + test:
        photos[name], masks[name] = _read_photo(folder / name, found.get(name), resolution)

    def collect(names: list[str]) -> Photos:
        if not names:
            return Photos(torch.empty(0, 3, resolution, resolution), torch.empty(0, 25), [])
        whole = torch.ones(1, resolution, resolution)
        given = [masks[n] for n in names]
        padded = None if all(m is None for m in given) else torch.stack([whole if m is None else m for m in given])
        images, cameras = torch.stack([photos[n] for n in names]), torch.tensor([labels[n] for n in names])
        return Photos(images, cameras, names, padded)

    person, procedural = str(manifest.get("person", folder.name)), bool(manifest.get("procedural", False))
    consent = str(manifest.get("consent") or "not recorded")
    face_model = None if manifest.get("face_model") is None else str(manifest["face_model"])
    return Album(folder, person, procedural, collect(train), collect(test), consent, face_model)


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


def _find_masks(folder: Path, files: list[str]) -> dict[str, Path]:
    """The mask file of every photo that has one, by the photo's name."""
    photo_of = {**{Path(name).with_suffix(".png").name: name for name in files}, **{name: name for name in files}}
    masks = [path for path in sorted((folder / "masks").glob("*")) if not path.name.startswith(".")]
    strange = [path.name for path in masks if path.name not in photo_of or path.suffix != ".png"]
    if strange:
        raise AlbumError(
            f"{folder / 'masks'} holds {_listing(strange)}, of no photo: a mask has its photo's name with .png"
        )
    return {photo_of[path.name]: path for path in masks}


def _read_photo(path: Path, mask_path: Path | None, resolution: int) -> tuple[Tensor, Tensor | None]:
    image = load_rgb(path)
    height, width = image.shape[-2:]
    if height != width:
        raise AlbumError(f"{path} is {width} × {height}; photos must be square crops aligned as EG3D does")
    if height < resolution:
        raise AlbumError(f"{path} is {width} × {height}; this generator needs at least {resolution} × {resolution}")
    if mask_path is None:
        return resize(image[None], resolution)[0], None
    mask = load_grey(mask_path)
    if mask.shape[-2:] != image.shape[-2:]:
        size = f"{mask.shape[-1]} × {mask.shape[-2]}"
        raise AlbumError(f"{mask_path} is {size}, its photo {width} × {height}: make the mask of the photo's size")
    if not bool((mask > 0).any()):
        raise AlbumError(f"{mask_path} is all black: no pixel of {path.name} would count; take that photo out")
    image, mask = masked_resize(image[None], mask[None], resolution)
    return image[0], mask[0]


def resize(images: Tensor, resolution: int) -> Tensor:
    """Antialiased bilinear resizing, as the losses compare with image_raw; (N, C, R, R) -> (N, C, r, r)."""
    if images.shape[-1] == resolution:
        return images
    size = (resolution, resolution)
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def masked_resize(images: Tensor, masks: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """`resize` of images (N, 3, R, R) and masks (N, 1, R, R) by which padded pixels (mask 0) reach no other pixel.

    Every result is the mean over true pixels alone, 0 where there is none; what padded pixels hold never matters.
    """
    images = torch.where(masks > 0, images, 0)
    if images.shape[-1] == resolution:
        return images, masks
    total, weight = resize(images * masks, resolution), resize(masks, resolution)
    true = weight > 1e-3  # below, a share of one pixel in a thousand decides nothing but rounding
    return torch.where(true, total / torch.where(true, weight, 1), 0), torch.where(true, weight.clamp(max=1), 0)


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
