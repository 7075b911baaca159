"""YuNet through OpenCV: a face detector of 0.2 MB with five landmarks (Wu et al., 2023).

https://doi.org/10.1007/s11633-023-1423-y; OpenCV's model zoo has the file, and `weights("yunet")` fetches it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.prepare.face_model import Points
from convlora.integrations.eg3d.prepare.landmarks import RGB, Face
from convlora.integrations.weights import weights

#: Longest sides, in pixels, at which a photo is searched until a face is found. The first finds faces from about
#: 1/40 of it to all of it; the second small faces in large photos, the third faces that fill theirs.
SIDES = (640, 1280, 320)
_SCORE, _OVERLAP, _MOST = 0.6, 0.3, 50
_TURNS = 4
_CANVAS, _FACE = 320, 0.28  # side of the picture that is searched again, and the eyes' distance in it


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """OpenCV announces with every call which of its engines it has chosen."""
    from cv2.utils import logging

    before = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_ERROR)
    try:
        yield
    finally:
        logging.setLogLevel(before)


class YuNet:
    """A `LandmarkDetector`. `model` is the .onnx file, None the published one.

    Raises `ConvloraError`: OpenCV is not installed. `FileError`: no such file, or not a model that OpenCV reads.
    `HubError`: the published one is not here and cannot be fetched.
    """

    def __init__(self, model: str | Path | None = None) -> None:
        try:
            import cv2
        except ImportError:
            raise ConvloraError(
                'finding faces needs OpenCV: pip install "convlora[faces]"; or give landmarks of your own '
                "(--landmarks FILE)"
            ) from None
        self.path = weights("yunet", model)
        try:
            with _quiet():
                self._detector = cv2.FaceDetectorYN.create(str(self.path), "", (320, 320), _SCORE, _OVERLAP, _MOST)
        except cv2.error as error:
            raise FileError(f"{self.path} is no face detector that OpenCV can read: {error.err}") from None
        self._cv2 = cv2

    def detect(self, image: RGB, name: str) -> list[Face]:
        """Faces (H, W, 3) RGB, best score first."""
        longest = max(image.shape[:2])
        for side in SIDES:
            if side > longest and side != SIDES[0]:
                continue  # enlarging shows nothing new
            faces = self._at(image, min(1.0, side / longest))
            if faces:
                return [self._upright(image, face) for face in faces]
        return []

    def _upright(self, image: RGB, face: Face) -> Face:
        """The face with the landmarks found once its eyes are level and its size is one YuNet knows best.

        Trained on upright faces, YuNet sees a head tilted by 40° as one tilted by 15°; a few turns find the rest.
        """
        finest = max(1, int(face.eye_distance / (_FACE * _CANVAS)))  # what follows would skip pixels of a larger photo
        if finest > 1:
            size = max(1, image.shape[1] // finest), max(1, image.shape[0] // finest)
            reduced: Any = self._cv2.resize(image, size, interpolation=self._cv2.INTER_AREA)
            factor = np.array(image.shape[1::-1]) / size
            marks = self._turned(reduced, (face.landmarks + 0.5) / factor - 0.5)
            return Face(face.box, (marks + 0.5) * factor - 0.5, face.score)
        return Face(face.box, self._turned(image, face.landmarks), face.score)

    def _turned(self, image: RGB, marks: Points) -> Points:
        for _ in range(_TURNS):
            eyes = marks[1] - marks[0]
            down = marks[3:].mean(0) - marks[:2].mean(0)
            # Pixels of the canvas per pixel of the photo; a face seen from the side has its eyes close together.
            zoom = _FACE * _CANVAS / max(float(np.hypot(*eyes)), float(np.hypot(*down)), 1.0)
            angle = np.arctan2(eyes[1], eyes[0])
            turn = zoom * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            shift = (_CANVAS - 1) / 2 - turn @ marks.mean(0)
            there: Any = self._cv2.warpAffine(
                image, np.concatenate([turn, shift[:, None]], 1), (_CANVAS, _CANVAS),
                flags=self._cv2.INTER_CUBIC,
            )  # fmt: skip
            found = self._at(there, 1.0)
            if not found:
                break
            nearest = min(found, key=lambda other: float(np.hypot(*(other.landmarks.mean(0) - (_CANVAS - 1) / 2))))
            moved = (nearest.landmarks - shift) @ np.linalg.inv(turn).T
            if np.hypot(*(moved.mean(0) - marks.mean(0))) > np.ptp(marks, axis=0).max():
                break  # another face
            marks = moved
        return marks

    def _at(self, image: RGB, scale: float) -> list[Face]:
        height, width = image.shape[:2]
        size = max(1, round(width * scale)), max(1, round(height * scale))
        bgr: Any = np.ascontiguousarray(image[..., ::-1])
        if size != (width, height):
            bgr = self._cv2.resize(bgr, size, interpolation=self._cv2.INTER_AREA)
        self._detector.setInputSize(size)
        with _quiet():
            _, rows = self._detector.detect(bgr)
        if rows is None:
            return []
        factor = np.array([width / size[0], height / size[1]])
        rows = rows[rows[:, 14].argsort()[::-1]].astype(np.float64)
        points = (rows[:, 4:14].reshape(-1, 5, 2) + 0.5) * factor - 0.5
        boxes = rows[:, :4] * np.tile(factor, 2)
        return [
            Face((box[0], box[1], box[2], box[3]), marks, float(score))
            for box, marks, score in zip(boxes.tolist(), points, rows[:, 14])
        ]
