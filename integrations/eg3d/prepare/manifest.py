"""An album's manifest: what was decided about each photo, and whether the album is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convlora.errors import AlbumError
from convlora.integrations.eg3d.run_folder import write_text

FORMAT, FORMAT_VERSION = "convlora-album", "1"
NOT_RECORDED = "not recorded"

Record = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """An album: its folder, the files of each split, and (source, reason) of each photo that was left out."""

    folder: Path
    train: list[str]
    test: list[str]
    rejected: list[tuple[str, str]]


def check_folders(photos: str | Path, album: str | Path) -> tuple[Path, Path]:
    """Both as paths, or `AlbumError` if one lies in the other."""
    source, folder = Path(photos), Path(album)
    inside, outside = folder.resolve(), source.resolve()
    if source.is_file():  # beside a single photo an album is no danger
        return source, folder
    if inside == outside or outside in inside.parents:
        raise AlbumError(f"the album {folder} would lie inside the photos {source}: choose a folder elsewhere")
    if inside in outside.parents:
        raise AlbumError(f"the photos {source} lie inside the album {folder}: choose another folder for the album")
    return source, folder


def fingerprint(paths: Sequence[Path]) -> str:
    """Number, names, sizes and times of the photos, as one line."""
    told = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return f"{len(paths)} photos, {hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"


def read_finished(folder: Path, choices: Record) -> Prepared | None:
    """What a finished album's manifest says, None if it is not finished; `AlbumError` if it was made otherwise."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        split, left_out = manifest["split"], manifest["rejected"]
        done = Prepared(
            folder, split["train"], split["test"], [(entry["source"], entry["reason"]) for entry in left_out]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlbumError(f"{path} is damaged ({error!r}): remove it, and the same call writes it again") from None
    before, now = manifest.get("choices", {}), json.loads(json.dumps(choices))
    if changed := [key for key in now if before.get(key) != now[key]]:
        told = ", ".join(f"{key}: {before.get(key)!r} there, {now[key]!r} now" for key in changed)
        raise AlbumError(f"{folder} is finished, with other choices ({told}); choose another folder or remove it")
    return done


def spread_over(yaws: Sequence[float], held_out: int) -> set[int]:
    """`held_out` of the indices, evenly spread over the order of their yaw."""
    order = sorted(range(len(yaws)), key=lambda at: (yaws[at], at))
    return {order[int((i + 0.5) * len(order) / held_out)] for i in range(held_out)}


def write_manifest(
    folder: Path, photos: dict[str, Record], rejected: Sequence[Record], choices: Record, split: dict[str, list[str]],
    **more: Any,
) -> Prepared:  # fmt: skip
    """Write manifest.json, which makes the album a finished one."""
    manifest = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "person": choices["person"], "procedural": False,
        "consent": choices["consent"], **more, "split": split, "photos": photos, "rejected": list(rejected),
        "choices": choices,
    }  # fmt: skip
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
    return Prepared(folder, split["train"], split["test"], [(r["source"], r["reason"]) for r in rejected])


def split_of(names: Sequence[str], yaws: Sequence[float], held_out: int) -> dict[str, list[str]]:
    """The train and test files, or `AlbumError` if nothing would be left to train on."""
    if held_out >= len(names):
        raise AlbumError(f"held_out={held_out} of {len(names)} usable photos leaves nothing to personalise with")
    test = spread_over(yaws, held_out)
    return {
        "train": [name for at, name in enumerate(names) if at not in test],
        "test": [name for at, name in enumerate(names) if at in test],
    }
