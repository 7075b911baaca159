"""The contact sheet: every photo with what was found in it, to be looked at before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from convlora.integrations.eg3d.images import save_png
from convlora.integrations.eg3d.prepare.face_model import Points
from convlora.integrations.eg3d.prepare.landmarks import RGB
from convlora.integrations.eg3d.prepare.pose import Angles, rotation

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

CELL, _LINE, _LINES, _GAP = 192, 13, 4, 8
_COLUMNS = 6
_AXES = ((220, 40, 40), (40, 170, 60), (50, 90, 230))  # x red, y green, z blue, as everywhere


class Entry(NamedTuple):
    """One cell. image (H, W, 3); landmarks (5, 2) in its pixels and angles, if it is an aligned crop; `reason`, why
    it was rejected, greys it out; mask (H, W), 0 where it was padded, fades that part."""

    name: str
    image: RGB | None
    landmarks: Points | None = None
    angles: Angles | None = None
    reason: str = ""
    mask: NDArray[np.uint8] | None = None


def draw_sheet(entries: Sequence[Entry]) -> Image.Image:
    """One cell per photo: picture, landmarks, the head's axes (x red, y green, z blue), name, and angles or reason."""
    from PIL import Image, ImageDraw

    columns = min(_COLUMNS, max(1, len(entries)))
    rows = -(-len(entries) // columns)
    height = CELL + _LINES * _LINE + _GAP
    page = Image.new("RGB", (columns * (CELL + _GAP) + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(page)
    for at, entry in enumerate(entries):
        left, top = _GAP + at % columns * (CELL + _GAP), _GAP + at // columns * height
        page.paste(_picture(entry), (left, top))
        lines = _wrapped(draw, _caption(entry), CELL)
        draw.multiline_text((left, top + CELL + 1), "\n".join(lines[:_LINES]), fill=(60, 60, 60), spacing=1)
    return page


def save_sheet(path: str | Path, entries: Sequence[Entry]) -> Path:
    """Write `draw_sheet` as PNG."""
    return save_png(path, draw_sheet(entries))


def _caption(entry: Entry) -> str:
    if entry.reason or entry.angles is None:
        return f"{entry.name}\n{entry.reason}"
    return "{}\nyaw {:+.0f}°  pitch {:+.0f}°  roll {:+.0f}°".format(entry.name, *entry.angles)


def _picture(entry: Entry) -> Image.Image:
    from PIL import Image, ImageDraw, ImageOps

    cell = Image.new("RGB", (CELL, CELL), (235, 235, 235))
    if entry.image is None:
        return cell
    whole = Image.fromarray(entry.image)
    if entry.mask is not None:
        white = Image.new("RGB", whole.size, "white")
        whole = Image.composite(whole, Image.blend(whole, white, 0.6), Image.fromarray(entry.mask))
    picture = ImageOps.contain(whole, (CELL, CELL))
    if entry.landmarks is not None:
        points = (entry.landmarks + 0.5) * (picture.width / entry.image.shape[1])
        draw = ImageDraw.Draw(picture)
        if entry.angles is not None:
            _draw_axes(draw, points[2], entry.angles)
        for x, y in points.tolist():
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(255, 230, 0), outline=(0, 0, 0))
    if entry.reason:
        picture = Image.blend(ImageOps.grayscale(picture).convert("RGB"), Image.new("RGB", picture.size, "white"), 0.45)
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell


def _draw_axes(draw: ImageDraw.ImageDraw, origin: Points, angles: Angles) -> None:
    """The head's x, y and z from the nose, as the camera sees them."""
    axes = rotation(angles)[:, :2] * (0.22 * CELL)  # a row: where a world axis points in the picture
    depth = rotation(angles)[:, 2]
    for at in np.argsort(-depth):  # far ends first
        end = origin + axes[at]
        draw.line((*origin, *end), fill=_AXES[at], width=3)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}".lstrip()
            if line and draw.textlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return [_shortened(draw, line, width) for line in lines]


def _shortened(draw: ImageDraw.ImageDraw, line: str, width: int) -> str:
    if draw.textlength(line) <= width:
        return line
    while line and draw.textlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
