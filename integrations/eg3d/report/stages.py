"""What one explores on the page: the head from around it, the way from photo to photo, edits. Drawn ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convlora.errors import AlbumError, ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.batches import digest, model_digest
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.images import grid, load_rgb, save_png
from convlora.integrations.eg3d.report.content import Axis, Stage
from convlora.integrations.eg3d.tasks import edit_alpha, novel_views, personal_direction
from convlora.integrations.eg3d.tasks.directions import Direction
from convlora.integrations.eg3d.tasks.hull import Hull

LARGEST = 256  # pixels a side of what is kept and shown


@dataclass(frozen=True)
class Plan:
    """How many pictures are drawn, and how far they go. The defaults suit the demo on two cores."""

    yaws: int = 9
    pitches: int = 5
    yaw: float = 0.45  # radians to each side
    pitch: float = 0.15  # radians up and down
    photos: int = 4  # that the interpolation visits
    between: int = 5  # steps from one to the next
    strengths: int = 7  # of an edit, odd: the middle one changes nothing
    reach: float = 3.0  # of an edit, in standard deviations of the person's anchors along its direction
    dilation: float = 2.0  # of the hull that edits stay in

    def __post_init__(self) -> None:
        fewest = {"yaws": 1, "pitches": 1, "photos": 1, "between": 1, "strengths": 3}
        for name, least in fewest.items():
            if getattr(self, name) < least or (name == "strengths" and self.strengths % 2 == 0):
                odd = ", and odd" if name == "strengths" else ""
                raise ConvloraError(f"a page with {name}={getattr(self, name)}: at least {least}{odd}, please")

    @property
    def grid(self) -> str:
        return f"{self.yaws} yaws × {self.pitches} pitches"


class _Shot(NamedTuple):
    """A stage whose pictures are not there yet, and what they are of: w (N, w_dim) from labels (V, 25)."""

    stage: Stage
    w: Tensor
    labels: Tensor


def explore(
    models: Mapping[str, TriPlaneGenerator],
    hull: Hull,
    originals: Sequence[tuple[str, Tensor]],
    directions: Sequence[Direction] = (),
    *,
    first: int = 0,
    plan: Plan = Plan(),
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[Stage]:
    """The stages of the page, drawn by every model (all of one size and orbit).

    Args:
        hull: the person's anchors (N, w_dim).
        originals: the anchors' photos, name and (3, R, R), in the same order.
        directions: attributes to edit, a stage of each.
        first: the anchor that is turned and edited, and from which the interpolation starts.
        folder: where drawn pictures are kept, one PNG for a stage and model; those that are there and of the same
            latents, cameras and weights are not drawn again, sheets of others are removed.
    """
    orbit = cameras.orbit_of(next(iter(models.values())).rendering_kwargs)
    hull = Hull(hull.anchors.detach().cpu(), plan.dilation)
    shots = [_turn(hull, originals[first], first, plan, orbit)]
    for number, direction in enumerate(directions, 1):
        shots.append(_edits(hull, originals[first], first, direction, f"edit{number}", plan, orbit))
    if len(hull.anchors) > 1:
        shots.append(_path(hull, originals, first, plan, orbit))
    digests = {name: model_digest(model) for name, model in models.items()} if folder is not None else {}
    kept: list[Path] = []
    stages = []
    with tqdm(total=len(shots) * len(models), desc="drawing for the page", disable=not progress) as bar:
        for shot in shots:
            views = {}
            for number, (name, model) in enumerate(models.items()):
                if folder is None:
                    views[name] = _draw(model, shot)
                else:
                    key = digest(shot.w, shot.labels) + digests[name]
                    kept.append(Path(folder, f"{shot.stage.name}_{number}_{key}.png"))
                    views[name] = _kept(kept[-1], len(shot.stage.axes[0].labels), partial(_draw, model, shot))
                bar.update()
            stages.append(replace(shot.stage, views=views))
    if folder is not None:
        for old in set(Path(folder).glob(f"*_{'[0-9a-f]' * 32}.png")) - set(kept):
            old.unlink()
    return stages


def _turn(hull: Hull, original: tuple[str, Tensor], first: int, plan: Plan, orbit: dict) -> _Shot:
    yaws, pitches = (
        torch.linspace(-far, far, count) if count > 1 else torch.zeros(1)
        for far, count in ((plan.yaw, plan.yaws), (plan.pitch, plan.pitches))
    )
    # looked at from the right, a face has turned to the left: under the finger it follows the other way
    axes = (
        Axis("turn (yaw)", [_degrees(yaw) for yaw in yaws.tolist()], plan.yaws // 2, -1),
        Axis("tilt (pitch)", [_degrees(pitch) for pitch in pitches.tolist()], plan.pitches // 2),
    )
    poses = cameras.look_at(
        math.pi / 2 + yaws.repeat(plan.pitches), cameras.vertical_angle(pitches.repeat_interleave(plan.yaws)), **orbit
    )
    lead = f"The head of {original[0]} from around it. Drag a picture or move the sliders."
    stage = Stage("turntable", "Turn the head", lead, axes, {}, [("the photo", original[1])], plays=True)
    return _Shot(stage, hull.anchors[first : first + 1], cameras.label(poses))


def _path(hull: Hull, originals: Sequence[tuple[str, Tensor]], first: int, plan: Plan, orbit: dict) -> _Shot:
    visited = far_apart(hull.anchors, plan.photos, first)
    corners = hull.anchors[visited]
    weights = torch.arange(plan.between) / plan.between
    w = torch.cat([torch.lerp(a[None], b[None], weights[:, None]) for a, b in zip(corners, corners[1:])])
    labels = []
    for number in range(1, len(visited)):
        labels.append(f"photo {number}")
        labels += [f"{weight:.0%} from {number} to {number + 1}" for weight in weights[1:].tolist()]
    photos = [(f"photo {number}, {originals[i][0]}", originals[i][1]) for number, i in enumerate(visited, 1)]
    lead = (
        f"A straight line through the latents of {len(visited)} photos that lie far apart. All that is between two "
        "photos should be the same person. Select a photo to go there."
    )
    stops = [plan.between * number for number in range(len(visited))]
    axes = (Axis("between photos", [*labels, f"photo {len(visited)}"]),)
    stage = Stage("interpolation", "From photo to photo", lead, axes, {}, photos, stops, plays=True)
    return _Shot(stage, torch.cat([w, corners[-1:]]), cameras.frontal(1, **orbit))


def _edits(
    hull: Hull, original: tuple[str, Tensor], first: int, direction: Direction, name: str, plan: Plan, orbit: dict
) -> _Shot:
    steps = torch.linspace(-plan.reach, plan.reach, plan.strengths)
    alpha = torch.zeros(1, len(hull.anchors))
    alpha[0, first] = 1
    inside = personal_direction(hull, direction.normal)
    spread = (hull.anchors @ inside.step / inside.step.norm().clamp_min(1e-12)).std()
    # the hull's point next to it in W keeps more of an edit than the one next to it in coefficients, `exit="project"`
    w = hull.w(hull.project(hull.w(edit_alpha(hull, alpha, inside, steps * spread)[:, 0])))
    labels = [f"{step:+.2g} σ".replace("-", "−") if step else "as it is" for step in steps.tolist()]
    lead = (
        f"{original[0]} with less or more of it, kept inside the space of this person's photos. σ is their spread; "
        f"{inside.cosine:.2f} of 1 is how well they span the direction."
    )
    axes = (Axis(direction.attribute, labels, plan.strengths // 2),)
    stage = Stage(name, f"Edit: {direction.attribute}", lead, axes, {}, [("the photo", original[1])])
    return _Shot(stage, w, cameras.frontal(1, **orbit))


def best_spanned(hull: Hull, directions: Sequence[Direction], count: int) -> list[Direction]:
    """The `count` directions of which the person's anchors span most, by the cosine of what they span of it."""
    return sorted(directions, key=lambda one: -personal_direction(hull, one.normal).cosine)[:count]


def far_apart(w: Tensor, count: int, first: int = 0) -> list[int]:
    """`first` and up to `count` − 1 more of w (N, w_dim), each the one farthest from all before it."""
    chosen = [first]
    nearest = (w - w[first]).norm(dim=1)
    while len(chosen) < min(count, len(w)):
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (w - w[chosen[-1]]).norm(dim=1))
    return chosen


def _draw(model: TriPlaneGenerator, shot: _Shot) -> Tensor:
    """(K, 3, r, r) in [-1, 1]."""
    images = novel_views(model, shot.w, shot.labels).flatten(0, 1)
    return resize(images.float(), min(LARGEST, images.shape[-1]))


def _kept(path: Path, columns: int, draw: Callable[[], Tensor]) -> Tensor:
    """The pictures of a sheet with so many columns; drawn and kept if it is not there, or damaged."""
    if not path.is_file() or (images := _cut(path, columns)) is None:
        save_png(path, grid(draw(), columns))
        images = _cut(path, columns)
    assert images is not None
    return images


def _cut(path: Path, columns: int) -> Tensor | None:
    try:
        sheet = load_rgb(path)
    except AlbumError:
        return None
    side = sheet.shape[2] // columns
    if side * columns != sheet.shape[2] or sheet.shape[1] % side:
        return None
    return sheet.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _degrees(radians: float) -> str:
    degrees = round(math.degrees(radians))
    return f"{degrees:+d}°".replace("-", "−") if degrees else "0°"
