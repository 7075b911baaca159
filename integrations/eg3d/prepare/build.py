"""From a folder of photos to an album: every step's result is kept, so that an interrupted run goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from convlora.errors import AlbumError, ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import CONTACT_SHEET
from convlora.integrations.eg3d.images import load_rgb, save_png, write_bytes
from convlora.integrations.eg3d.metrics.identity import IdentityEncoder
from convlora.integrations.eg3d.prepare.align import PADDINGS, Padding, align
from convlora.integrations.eg3d.prepare.face_model import FaceModel, face_model
from convlora.integrations.eg3d.prepare.landmarks import RGB, Face, LandmarkDetector
from convlora.integrations.eg3d.prepare.manifest import (
    NOT_RECORDED,
    Prepared,
    Record,
    check_folders,
    fingerprint,
    read_finished,
    split_of,
    write_manifest,
)
from convlora.integrations.eg3d.prepare.person import LARGER, SAME_PERSON, largest_face, main_person
from convlora.integrations.eg3d.prepare.photos import list_photos, read_photo
from convlora.integrations.eg3d.prepare.pose import PITCH_PRIOR, Angles, fit_pose, pose_from_landmarks
from convlora.integrations.eg3d.prepare.quality import (
    Limits,
    Measures,
    differing_bits,
    faults,
    measure,
    perceptual_hash,
)
from convlora.integrations.eg3d.prepare.sheet import CELL, Entry, save_sheet
from convlora.integrations.eg3d.run_folder import RunFolder, write_text
from convlora.integrations.weights import digest

_MOST_FACES = 8  # of one photo, the largest first
_IDENTITY_BATCH = 16


def prepare(
    photos: str | Path, album: str | Path, *, detector: LandmarkDetector | None = None,
    identity: IdentityEncoder | None = None, same_person: float = SAME_PERSON, species: str = "face", size: int = 512,
    held_out: int = 0, person: str | None = None, consent: str = NOT_RECORDED, padding: Padding = "mirror",
    pitch_prior: tuple[float, float] | None = PITCH_PRIOR, limits: Limits | None = None, keep_all: bool = False,
    progress: bool = True,
) -> Prepared:  # fmt: skip
    """Make an album for `load_album` of one person's photos; the photos themselves are never touched.

    Args:
        photos: a folder (subfolders are not searched) or one photo.
        album: the folder to write, new or of an interrupted run with the same input, which then goes on. Finished,
            the same call returns what is there.
        detector: finds the landmarks; None is `YuNet()`. `LandmarkFile(path)` reads your own.
        identity: images (N, 3, R, R) in [-1, 1] -> unit vectors (N, D), to choose the person where several faces
            appear and to leave other people's photos out; None takes the clearly largest face. One made with
            `load_identity(…, align="5pt")` gets the landmarks too and tells people apart best.
        same_person: the cosine from which on two faces are one person's; it depends on the encoder.
        species: whose mean face the landmarks are compared with: "face", "cat" or "lab".
        size: side of the album's photos in pixels.
        held_out: how many photos are the test split, spread evenly over yaw.
        person, consent: for the manifest; None is the name of the photos' folder.
        padding: what lies outside a photo: "mirror", "edge" or "black"; recorded in `masks/` in any case.
        pitch_prior: mean and standard deviation of pitch in degrees; see `fit_pose`.
        limits: what a photo must keep to; None is `Limits()`.
        keep_all: keep photos that break `limits`, with a warning in the manifest. What cannot be read, has no face
            or shows someone else is left out all the same.

    Raises `AlbumError`: no photos, the album inside the photos' folder or the reverse, an album of other input, no
    usable photo (saying why, photo by photo), or too few for `held_out`. `ConvloraError`: a wrong option.
    """
    source, folder = check_folders(photos, album)
    if (source / "dataset.json").is_file():
        raise AlbumError(
            f"{source} has a dataset.json: its photos seem to be aligned already. Take them as they are with "
            "--aligned (copy_aligned), or give the original photos, or move dataset.json away to align them again"
        )
    if size < 64 or held_out < 0:
        raise ConvloraError(f"size={size} and held_out={held_out}: at least 64 pixels and 0 photos")
    if padding not in PADDINGS:
        raise ConvloraError(f"padding is {padding!r}; one of {', '.join(PADDINGS)}")
    if pitch_prior is not None and not pitch_prior[1] > 0:
        raise ConvloraError(f"the standard deviation of pitch is {pitch_prior[1]}; it must be above 0 degrees")
    model = face_model(species)
    paths = list_photos(source)
    finder = _detector(detector, model)
    limits = limits or Limits()
    choices = {
        "held_out": held_out, "keep_all": keep_all, "person": person or source.resolve().stem, "consent": consent,
        "limits": asdict(limits), "identity": getattr(identity, "name", "given") if identity else None,
        "same_person": same_person,
    }  # fmt: skip
    settings = {
        "photos": fingerprint(paths), "species": species, "size": size, "padding": padding, "several": bool(identity),
        "pitch_prior": None if pitch_prior is None else list(pitch_prior), "detector": _name(finder),
    }  # fmt: skip
    with RunFolder(folder, settings):
        if finished := read_finished(folder, choices):
            return finished
        work = folder / ".work"
        work.mkdir(exist_ok=True)

        def one(index: int, path: Path) -> Record:
            return _inspect(index, path, work, finder, model, size, padding, pitch_prior, identity is not None)

        records = _inspect_all(paths, work, one, progress)
        if identity is not None:
            _choose_person(records, work, identity, same_person)
        _judge(records, limits, keep_all)
        return _finish(folder, work, records, model, choices)


def _detector(detector: LandmarkDetector | None, model: FaceModel) -> LandmarkDetector:
    if detector is not None:
        return detector
    if model.name != "face":
        raise ConvloraError(f"no detector is known for {model.name}s: give their landmarks (--landmarks FILE)")
    from convlora.integrations.eg3d.prepare.yunet import YuNet

    return YuNet()


def _name(detector: LandmarkDetector) -> str:
    path = getattr(detector, "path", None)
    return type(detector).__name__ + (f" {digest(path)[:12]}" if path else "")


def _inspect_all(paths: Sequence[Path], work: Path, one: Callable[[int, Path], Record], progress: bool) -> list[Record]:
    records = []
    with tqdm(enumerate(paths), "photos", total=len(paths), disable=not progress) as bar:
        for index, path in bar:
            kept = work / f"{index:04d}.json"
            if not kept.is_file():
                write_text(kept, json.dumps(one(index, path)))
            records.append(json.loads(kept.read_text(encoding="utf-8")))
    return records


def _inspect(
    index: int, path: Path, work: Path, detector: LandmarkDetector, model: FaceModel, size: int, padding: Padding,
    pitch_prior: tuple[float, float] | None, several: bool,
) -> Record:  # fmt: skip
    """One photo's faces, each aligned and measured; their crops go into `work`."""
    record: Record = {"index": index, "source": path.name, "faces": [], "chosen": None, "reason": ""}
    try:
        image = read_photo(path)
        save_png(work / f"{index:04d}.png", _thumbnail(image))
        faces = sorted(detector.detect(image, path.name), key=lambda face: -face.area)[:_MOST_FACES]
    except AlbumError as error:
        return {**record, "reason": str(error)}
    record["hash"] = f"{perceptual_hash(image):064x}"
    if not faces:
        return {**record, "reason": "no face was found"}
    if not several:
        main = largest_face(faces)
        if main is None:
            record["reason"] = (
                f"{len(faces)} faces, none {LARGER:g} times as large as the others: use --identity, or crop it"
            )
        faces = [faces[main or 0]]
    wrong = ""
    for face in faces:
        stem = f"{index:04d}_{len(record['faces'])}"
        try:
            record["faces"].append(_face(face, image, work, stem, model, size, padding, pitch_prior))
        except ConvloraError as error:
            wrong = str(error)
    if not record["faces"]:
        return {**record, "reason": wrong}
    return record if several else {**record, "chosen": 0}


def _face(
    face: Face, image: RGB, work: Path, stem: str, model: FaceModel, size: int, padding: Padding,
    pitch_prior: tuple[float, float] | None,
) -> Record:  # fmt: skip
    crop = align(image, face.landmarks, model, size, padding, pitch_prior)
    cam2world, angles = pose_from_landmarks(crop.landmarks, model, size, pitch_prior)
    residual = fit_pose(crop.landmarks, model, pitch_prior).residual
    intrinsics = torch.tensor([[model.focal, 0, 0.5], [0, model.focal, 0.5], [0, 0, 1]])
    label = cameras.label(cam2world, intrinsics)[0]
    m = measure(face, crop, angles, residual)
    save_png(work / f"{stem}.png", _picture(crop.image))
    padded = float((crop.mask == 0).mean())
    if padded:
        save_png(work / f"{stem}_mask.png", _picture(crop.mask))
    return {
        "stem": stem, "box": [round(x, 2) for x in face.box], "landmarks": crop.landmarks.round(3).tolist(),
        "landmarks_in_photo": face.landmarks.round(3).tolist(), "label": label.tolist(), "area": face.area,
        "measures": {**m._asdict(), "angles": list(m.angles)}, "padded": padded,
    }  # fmt: skip


def _choose_person(records: Sequence[Record], work: Path, identity: IdentityEncoder, threshold: float) -> None:
    """Choose each photo's face of the person who is in most of them."""
    faces = [face for record in records for face in record["faces"]]
    vectors = _embed(faces, work, identity)
    counts = np.cumsum([len(record["faces"]) for record in records])
    chosen = main_person(
        np.split(vectors, counts[:-1]), [[face["area"] for face in record["faces"]] for record in records], threshold
    )
    for record, at in zip(records, chosen):
        record["chosen"] = at
        if at is None and record["faces"]:
            record["reason"] = "not the person of the other photos"


def _embed(faces: Sequence[Record], work: Path, identity: IdentityEncoder) -> np.ndarray:
    rows = []
    for start in range(0, len(faces), _IDENTITY_BATCH):
        batch = faces[start : start + _IDENTITY_BATCH]
        images = torch.stack([load_rgb(work / f"{face['stem']}.png") for face in batch])
        with torch.no_grad():
            if getattr(identity, "align", None) == "5pt":
                landmarks = torch.tensor([face["landmarks"] for face in batch])
                rows.append(identity(images, landmarks))  # type: ignore[call-arg]
            else:
                rows.append(identity(images))
    return torch.cat(rows).float().cpu().numpy() if rows else np.zeros((0, 1))


def _judge(records: Sequence[Record], limits: Limits, keep_all: bool) -> None:
    """Give every photo its reason to be left out, or with `keep_all` its warnings."""
    seen: list[Record] = []
    for record in records:
        if record["chosen"] is None:
            continue
        found = [record["reason"]] if record["reason"] else []
        found += faults(_measures(record), limits)
        for other in seen:
            bits = differing_bits(int(record["hash"], 16), int(other["hash"], 16))
            if bits <= limits.duplicate:
                found.append(f"a duplicate of {other['source']} ({bits} of 256 bits differ)")
                break
        if found and not keep_all:
            record["reason"] = "; ".join(found)
        else:
            record["warnings"], record["reason"] = found, ""
            seen.append(record)


def _measures(record: Record) -> Measures:
    values = record["faces"][record["chosen"]]["measures"]
    return Measures(**{**values, "angles": Angles(*values["angles"])})


def _finish(folder: Path, work: Path, records: Sequence[Record], model: FaceModel, choices: Record) -> Prepared:
    kept = [record for record in records if not record["reason"]]
    rejected = [{"source": r["source"], "reason": r["reason"]} for r in records if r["reason"]]
    if not kept:
        raise AlbumError(
            f"none of the {len(records)} photos can be used:\n"
            + "\n".join(f"  {r['source']}: {r['reason']}" for r in rejected[:20])
            + (f"\n  and {len(rejected) - 20} more" if len(rejected) > 20 else "")
            + "\n--keep-all, or other limits, go on from what was found here"
        )
    names = [_file_name(record) for record in kept]
    split = split_of(names, [_measures(record).angles.yaw for record in kept], choices["held_out"])
    for stale in [*folder.glob("*.png"), *(folder / "masks").glob("*.png")]:  # of an interrupted run
        stale.unlink()
    photos: dict[str, Record] = {}
    labels = []
    for name, record in zip(names, kept):
        face = record["faces"][record["chosen"]]
        write_bytes(folder / name, (work / f"{face['stem']}.png").read_bytes())
        if face["padded"]:
            write_bytes(folder / "masks" / name, (work / f"{face['stem']}_mask.png").read_bytes())
        photos[name] = _entry(record)
        labels.append([name, face["label"]])
    write_text(folder / "dataset.json", json.dumps({"labels": labels}))
    save_sheet(folder / CONTACT_SHEET, list(_cells(records, work)))
    procedural = {"procedural": True} if model.name == "lab" else {}
    done = write_manifest(folder, photos, rejected, choices, split, face_model=model.name, **procedural)
    shutil.rmtree(work)
    return done


def _entry(record: Record) -> Record:
    face, m = record["faces"][record["chosen"]], _measures(record)
    return {
        "source": record["source"], "box": face["box"], "landmarks": face["landmarks"],
        "landmarks_in_photo": face["landmarks_in_photo"], "yaw": round(m.angles.yaw, 2),
        "pitch": round(m.angles.pitch, 2), "roll": round(m.angles.roll, 2), "score": round(m.score, 4),
        "sharpness": round(m.sharpness, 2), "eye_distance": round(m.eye_distance, 2), "residual": round(m.residual, 4),
        "padded": round(face["padded"], 4), **({"warnings": record["warnings"]} if record["warnings"] else {}),
    }  # fmt: skip


def _cells(records: Sequence[Record], work: Path) -> Iterable[Entry]:
    for record in records:
        if record["chosen"] is None:
            thumbnail = work / f"{record['index']:04d}.png"
            yield Entry(record["source"], _pixels(thumbnail) if thumbnail.is_file() else None, reason=record["reason"])
            continue
        face = record["faces"][record["chosen"]]
        mask = _pixels(work / f"{face['stem']}_mask.png") if face["padded"] else None
        yield Entry(
            record["source"], _pixels(work / f"{face['stem']}.png"), np.array(face["landmarks"]),
            _measures(record).angles, record["reason"], mask,
        )  # fmt: skip


def _file_name(record: Record) -> str:
    stem = re.sub(r"[^\w-]+", "_", Path(record["source"]).stem)[:60]
    return f"{record['index']:04d}_{stem}.png"


def _picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _pixels(path: Path) -> RGB:
    from PIL import Image

    with Image.open(path) as file:
        return np.array(file)


def _thumbnail(image: RGB) -> Any:
    from PIL import ImageOps

    return ImageOps.contain(_picture(image), (CELL, CELL))
