"""A finished run folder, opened again: the generator with the person's adapter on it, and the person's anchors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import convlora
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos, load_album
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.checkpoint import load_generator
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.tasks.hull import Hull, make_hull


class Personal(NamedTuple):
    """G with the adapter on, frozen and in eval mode; the person's anchors; `generator`, what `load_generator` took;
    `album`, the folder of photos the run was made from."""

    G: TriPlaneGenerator
    anchors: Anchors
    generator: str
    album: Path

    def hull(self, dilation: float | None = None) -> Hull:
        """The person's space, on G's device."""
        return make_hull(self.anchors.w.to(next(self.G.parameters()).device), dilation)

    def photos(self, folder: str | Path, resolution: int | None = None) -> Photos:
        """All photos of an album, at G's resolution or another. If it is the run's own album and the run refined
        its cameras, those are used."""
        photos = load_album(folder, resolution or self.G.img_resolution).photos
        if self.anchors.labels is None or Path(folder).resolve() != self.album.resolve():
            return photos
        refined = dict(zip(self.anchors.names, self.anchors.labels))
        labels = [refined.get(name, label) for name, label in zip(photos.names, photos.labels)]
        return replace(photos, labels=torch.stack(labels))

    def photo(self, name: str | None) -> int:
        """The index of an anchor by its photo's name; None: the first.

        Raises:
            ConvloraError: no photo of that name; the names are listed.
        """
        if name is None:
            return 0
        if name not in self.anchors.names:
            raise ConvloraError(f"no anchor of {name!r}; there are {', '.join(self.anchors.names)}")
        return self.anchors.names.index(name)

    def w(self, name: str | None) -> Tensor:
        """(w_dim,): the latent of a photo."""
        return self.anchors.w[self.photo(name)]


def load_personal(folder: str | Path, device: str | torch.device = "cpu", pretrained: bool = False) -> Personal:
    """Open what `convlora eg3d personalize` or `demo` left in `folder`; `pretrained` leaves the adapter away.

    Raises:
        ConvloraError: the folder holds no finished run.
        FileError: a file of it is damaged, or the generator it names is gone.
    """
    folder = Path(folder)
    record, adapter, anchors = folder / "run.json", folder / "adapter.safetensors", folder / "anchors.safetensors"
    missing = [path.name for path in (record, adapter, anchors) if not path.is_file()]
    if missing:
        raise ConvloraError(
            f"{folder} holds no finished run of `convlora eg3d personalize` or `demo` ({', '.join(missing)} missing)"
        )
    told = json.loads(record.read_text(encoding="utf-8"))
    generator, album = str(told.get("generator", "lab")), Path(str(told.get("album", "")))
    G = load_generator(generator, device).requires_grad_(False)
    if not pretrained:
        for parameter in convlora.load_adapter(G, adapter).parameters():
            parameter.requires_grad_(False)
    return Personal(G, Anchors.load(anchors), generator, album if album.is_dir() else folder / "album")
