"""Folders that are aligned already: EG3D's own, with dataset.json and square photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from convlora.errors import AlbumError
from convlora.integrations.eg3d.album import CONTACT_SHEET, load_album
from convlora.integrations.eg3d.cameras import split_label
from convlora.integrations.eg3d.images import load_rgb, to_uint8, write_bytes
from convlora.integrations.eg3d.prepare.manifest import (
    NOT_RECORDED,
    Prepared,
    check_folders,
    fingerprint,
    read_finished,
    split_of,
    write_manifest,
)
from convlora.integrations.eg3d.prepare.pose import angles_of
from convlora.integrations.eg3d.prepare.sheet import Entry, save_sheet
from convlora.integrations.eg3d.run_folder import RunFolder, write_text


def copy_aligned(
    photos: str | Path, album: str | Path, *, held_out: int = 0, person: str | None = None, consent: str = NOT_RECORDED
) -> Prepared:
    """Check a folder of square photos with EG3D's dataset.json and copy it as an album, pixels and cameras unchanged.

    Raises `AlbumError`: whatever `load_album` refuses, and what `prepare` says of folders and `held_out`.
    """
    source, folder = check_folders(photos, album)
    if not (source / "dataset.json").is_file():
        raise AlbumError(f"{source} has no dataset.json, so its photos are not aligned yet: leave --aligned out")
    found = load_album(source, 8)  # small: to check every photo and label, not to keep them
    every = dict(zip(found.train.names + found.test.names, [*found.train.labels, *found.test.labels]))
    names = sorted(every)
    choices = {"held_out": held_out, "person": person or found.person, "consent": consent, "aligned": True}
    with RunFolder(folder, {"photos": fingerprint([source / name for name in names]), "aligned": True}):
        if finished := read_finished(folder, choices):
            return finished
        angles = [angles_of(split_label(every[name][None])[0][0]) for name in names]
        split = split_of(names, [angle.yaw for angle in angles], held_out)
        if not held_out and found.test.names:
            split = {"train": found.train.names, "test": found.test.names}
        for name in names:
            write_bytes(folder / name, (source / name).read_bytes())
            mask = Path("masks", name).with_suffix(".png")
            if (source / mask).is_file():
                write_bytes(folder / mask, (source / mask).read_bytes())
        labels = [[name, every[name].tolist()] for name in names]
        write_text(folder / "dataset.json", json.dumps({"labels": labels}))
        cells = [
            Entry(name, np.asarray(to_uint8(load_rgb(folder / name)).permute(1, 2, 0)), None, angle)
            for name, angle in zip(names, angles)
        ]
        save_sheet(folder / CONTACT_SHEET, cells)
        entries = {
            name: {"source": name, **{key: round(value, 2) for key, value in angle._asdict().items()}}
            for name, angle in zip(names, angles)
        }
        procedural = {"procedural": True} if found.procedural else {}
        return write_manifest(folder, entries, [], choices, split, **procedural)
