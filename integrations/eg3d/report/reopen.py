"""The report of a finished run, made again from its folder: numbers from report.json, pictures from the models."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlora import load_adapter
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.checkpoint import SHIPPED, load_generator
from convlora.integrations.eg3d.demo import lab_directions
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.personal import Personal, load_personal
from convlora.integrations.eg3d.pipeline import FULL, PRETRAINED, heldout_name
from convlora.integrations.eg3d.report.content import Report, Row, Spread
from convlora.integrations.eg3d.report.stages import Plan, explore
from convlora.integrations.eg3d.tasks import make_hull, novel_views
from convlora.integrations.eg3d.tasks.directions import Direction


def reopened(
    folder: str | Path,
    directions: Sequence[Direction] | None = None,
    *,
    photo: str | None = None,
    yaws: int | None = None,
    pitches: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Report:
    """The report of the run that `convlora eg3d personalize` or `demo` left in `folder`, with sliders of one's own.

    Args:
        directions: attributes to edit; None: those of the demo for the lab's generator, else none.
        photo: the name of the album's photo that is turned and edited; None: the first.
        yaws, pitches: how many views of the head; None: as in the demo for the lab's generator, else 21 and 5.

    Pictures of the sliders are kept in `sheets/` of the folder, and not drawn again where they fit.

    Raises:
        ConvloraError: no finished run, no photo of that name, the album is gone or has lost photos.
        FileError: a damaged file.
    """
    folder = Path(folder)
    base = load_personal(folder, device, pretrained=True)
    told = _told(folder / "report.json")
    album = base.photos(base.album)
    train, test = _part(album, base.anchors.names, base), _part(album, told["heldout_names"], base)
    rows = [_row(row) for row in told["rows"]]
    models = {row.name: _model(row.name, folder, base.G, device) for row in rows}
    settings = told["settings"]
    plan = Plan(
        yaws or (Plan.yaws if base.generator in SHIPPED else 21),
        pitches or Plan.pitches,
        float(settings.get("yaw", Plan.yaw)),
    )
    hull = make_hull(base.anchors.w)
    if directions is None:
        directions = lab_directions(base.G, hull) if base.generator == "lab" else ()
    originals = list(zip(train.names, train.images))
    stages = explore(
        models, hull, originals, directions, first=base.photo(photo), plan=plan, folder=folder / "sheets",
        progress=progress,
    )  # fmt: skip
    return Report(
        title=told["title"],
        person=told["person"],
        notice=told["notice"],
        command=told["command"],
        environment=told["environment"],
        settings={**settings, "frames": plan.grid},
        album=train.images,
        rows=rows,
        metric_notes=told["metric_notes"],
        heldout_names=test.names,
        heldout_truth=test.images,
        heldout={name: _heldout(model, folder, name, test) for name, model in models.items() if len(test)},
        stages=stages,
        curves={name: [(step, _number(loss)) for step, loss in points] for name, points in told["curves"].items()},
        moved_degrees={name: moved["photos"] for name, moved in told.get("moved_degrees", {}).items()},
    )


def _told(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConvloraError(f"{path} is missing: the run is not finished; the command that started it goes on with it")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        missing = {"title", "rows", "heldout_names", "curves", "settings"} - set(told)
    except (ValueError, TypeError) as error:
        raise FileError(f"{path} is no report.json of a run ({error})") from None
    if missing:
        raise FileError(f"{path} is no report.json of a run: {', '.join(sorted(missing))} missing")
    return dict(told)


def _row(told: dict[str, Any]) -> Row:
    metrics = {
        name: Spread(_number(of["mean"]), _number(of["std"]), of["count"]) for name, of in told["metrics"].items()
    }
    return Row(told["name"], told["trainables"], told["file_bytes"], told["seconds"], metrics)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _part(album: Photos, names: list[str], run: Personal) -> Photos:
    gone = [name for name in names if name not in album.names]
    if gone:
        raise ConvloraError(f"{run.album} has lost {', '.join(gone[:3])}, which the run was made from; bring it back")
    return album.part([album.names.index(name) for name in names])


def _model(name: str, folder: Path, G: TriPlaneGenerator, device: str | torch.device) -> TriPlaneGenerator:
    if name == PRETRAINED:
        return G
    if name == FULL:
        return load_generator(str(folder / "full.safetensors"), device).requires_grad_(False)
    model = copy.deepcopy(G)
    load_adapter(model, folder / "adapter.safetensors")
    return model.requires_grad_(False)


def _heldout(model: TriPlaneGenerator, folder: Path, name: str, photos: Photos) -> Tensor:
    found = Anchors.load(folder / f"{heldout_name(name)}.safetensors")
    if found.names != photos.names:
        raise FileError(f"{folder / heldout_name(name)}.safetensors is of other photos than report.json names")
    labels = photos.labels if found.labels is None else found.labels
    return novel_views(model, found.w, labels[:, None])[:, 0]
