"""Faces in a photo as five landmarks: found by a detector, or read from the user's own file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from convlora.errors import AlbumError, ConvloraError
from convlora.integrations.eg3d.prepare.face_model import Points
from convlora.integrations.eg3d.prepare.pose import checked_landmarks

RGB = NDArray[np.uint8]

#: How larger sets become five points: eyes as the middle of their two corners, as in EG3D's own reference points.
#: 68: dlib / iBUG 300-W. 468 and 478: MediaPipe's face mesh, without and with irises.
_IBUG = ((36, 39), (42, 45), (30,), (48,), (54,))
_MESH = ((33, 133), (362, 263), (1,), (61,), (291,))
REDUCTIONS: dict[int, tuple[tuple[int, ...], ...]] = {
    5: ((0,), (1,), (2,), (3,), (4,)), 68: _IBUG, 468: _MESH, 478: _MESH,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Face:
    """box: x, y, width, height. landmarks: (5, 2), image-left eye, image-right eye, nose tip, image-left and
    image-right mouth corner. Both in pixels of the upright photo, y down, pixel centres at integers. score: the
    detector's, in [0, 1]."""

    box: tuple[float, float, float, float]
    landmarks: Points
    score: float = 1.0

    @property
    def eye_distance(self) -> float:
        """Distance between the eyes in pixels."""
        return float(np.linalg.norm(self.landmarks[1] - self.landmarks[0]))

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return self.box[2] * self.box[3]


class LandmarkDetector(Protocol):
    """Whatever finds faces. Raises `AlbumError` where it cannot say anything about a photo."""

    def detect(self, image: RGB, name: str) -> list[Face]:
        """The faces in an upright photo (H, W, 3) uint8 of this file name, in any order; empty if there are none."""
        ...


def reduce_landmarks(points: Any) -> Points:
    """Five landmarks (5, 2) of 5, 68, 468 or 478 points, each x, y or x, y, z (z is dropped), in pixels.

    Raises `ConvloraError`: another number of points, or not finite numbers.
    """
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError):
        raise ConvloraError(f"these are no points [[x, y], …]: {str(points)[:60]}") from None
    if array.ndim != 2 or array.shape[1] not in (2, 3) or len(array) not in REDUCTIONS:
        counts = ", ".join(map(str, REDUCTIONS))
        raise ConvloraError(f"a face needs {counts} points of x and y, got an array of shape {array.shape}")
    return np.stack([array[list(group), :2].mean(0) for group in REDUCTIONS[len(array)]])


class LandmarkFile:
    """A `LandmarkDetector` that looks landmarks up in the user's file, by the photo's file name.

    JSON: `{"photo.jpg": [[x, y], …]}`, or a list of such faces where a photo has several. CSV: `name,x1,y1,x2,y2,…`,
    one line per face, with or without a header line. 5, 68, 468 or 478 points per face, in pixels of the upright
    photo, y down.

    Raises `AlbumError`: the file is missing, of another format, or has another number of points.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise AlbumError(f"no landmark file at {self.path}")
        suffix = self.path.suffix.lower()
        if suffix not in (".json", ".csv"):
            raise AlbumError(
                f"{self.path}: landmarks are read from .json or .csv, not {suffix or 'a file without end'}"
            )
        try:
            text = self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise AlbumError(f"{self.path} is not readable text: {error}") from None
        self._faces: dict[str, list[Points]] = {}
        for name, points in self._json(text) if suffix == ".json" else self._csv(text):
            try:
                self._faces.setdefault(name, []).append(reduce_landmarks(points))
            except ConvloraError as error:
                raise AlbumError(f"{self.path}: {name}: {error}") from None
        if not self._faces:
            raise AlbumError(f"{self.path} holds no landmarks")

    def detect(self, image: RGB, name: str) -> list[Face]:
        """The faces the file has for this photo; none if it does not name it."""
        return [self._face(points, image, name) for points in self._faces.get(name, [])]

    def missing(self, names: Iterable[str]) -> list[str]:
        """The photos of `names` that the file does not name."""
        return [name for name in names if name not in self._faces]

    def _face(self, points: Points, image: RGB, name: str) -> Face:
        height, width = image.shape[:2]
        if points.min() >= 0 and points.max() <= 1 < min(height, width):
            raise AlbumError(
                f"{self.path.name}: the landmarks of {name} lie between 0 and 1: multiply x by the photo's width "
                f"({width}) and y by its height ({height})"
            )
        outside = (points < -0.5) | (points > [width - 0.5, height - 0.5])
        if outside.any():
            x, y = points[outside.any(1)][0]
            raise AlbumError(
                f"{self.path.name}: the landmark ({x:g}, {y:g}) of {name} lies outside its {width} × {height} pixels; "
                "landmarks are counted in the photo as it is shown, turned upright"
            )
        try:
            checked_landmarks(points)
        except ConvloraError as error:
            raise AlbumError(f"{self.path.name}: {name}: {error}") from None
        centre, half = points.mean(0), 1.1 * float(np.ptp(points, axis=0).max())
        return Face((centre[0] - half, centre[1] - half, 2 * half, 2 * half), points)

    def _json(self, text: str) -> Iterable[tuple[str, Any]]:
        try:
            content = json.loads(text)
        except ValueError as error:
            raise AlbumError(f"{self.path} is not readable JSON: {error}") from None
        if not isinstance(content, dict):
            raise AlbumError(f'{self.path} must hold {{"photo.jpg": [[x, y], …]}}, not a {type(content).__name__}')
        for name, entry in content.items():
            faces = entry if _depth(entry) == 3 else [entry]
            yield from ((name, points) for points in faces)

    def _csv(self, text: str) -> Iterable[tuple[str, Any]]:
        for number, row in enumerate(csv.reader(text.splitlines()), 1):
            if not any(cell.strip() for cell in row):
                continue
            name, *cells = (cell.strip() for cell in row)
            try:
                values = [float(cell) for cell in cells]
            except ValueError:
                if number == 1:
                    continue  # a header
                raise AlbumError(f"{self.path}, line {number}: not name,x1,y1,…: {','.join(row)[:60]}") from None
            if not values or len(values) % 2:
                raise AlbumError(f"{self.path}, line {number}: {name} has {len(values)} numbers, not pairs of x and y")
            yield name, np.array(values).reshape(-1, 2)


def _depth(entry: Any) -> int:
    depth = 0
    while isinstance(entry, list) and entry:
        entry, depth = entry[0], depth + 1
    return depth
