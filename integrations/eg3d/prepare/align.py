"""Square crops around a face: EG3D's own for FFHQ's faces, a fit of the pose for every other model.

EG3D's: "Efficient Geometry-aware 3D Generative Adversarial Networks" (https://arxiv.org/abs/2112.07945), its crops of
photos in the wild. A scaled orthographic fit of five points gives scale and position, never a rotation: roll stays in
the picture and belongs to the camera.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from convlora.errors import AlbumError, ConvloraError
from convlora.integrations.eg3d.prepare.face_model import FACE, FACE_POINTS, FaceModel, Points
from convlora.integrations.eg3d.prepare.landmarks import RGB
from convlora.integrations.eg3d.prepare.pose import PITCH_PRIOR, checked_landmarks, fit_pose

Padding = Literal["mirror", "edge", "black"]
PADDINGS: tuple[str, ...] = get_args(Padding)
_MODES = {"mirror": "reflect", "edge": "edge"}

#: A 1024 image in which one face unit is 300 pixels, of which the middle 700 are kept.
_TARGET, _FACTOR, _KEPT = 1024, 300.0, 700
_MARGIN = (_TARGET - _KEPT) // 2
_WHOLE = 16_000_000  # pixels up to which the whole photo is resized, exactly as EG3D does


class Crop(NamedTuple):
    """image (S, S, 3) uint8. mask (S, S) uint8: 255 where the photo is, 0 where it was padded. landmarks (5, 2) in
    pixels of the crop."""

    image: RGB
    mask: NDArray[np.uint8]
    landmarks: Points


class Window(NamedTuple):
    """A square cut from a resized photo: the factor, the width and height after it, and the window's corner."""

    scale: float
    width: int
    height: int
    left: int
    top: int


def align(
    image: RGB, landmarks: ArrayLike, model: FaceModel = FACE, size: int = 512, padding: Padding = "mirror",
    pitch_prior: tuple[float, float] | None = PITCH_PRIOR,
) -> Crop:  # fmt: skip
    """The square crop of `size` pixels around the face with these landmarks (5, 2), pixels of the photo, y down.

    FFHQ's faces are cropped exactly as EG3D does; other models so that the crop has the model's focal length and its
    middle is the projection of the model's centre (`fit_pose`, with `pitch_prior`). What lies outside the photo is
    filled by `padding` (EG3D's own is "black") and is 0 in the mask.

    Raises `ConvloraError`: another padding, or wrong landmarks. `AlbumError`: the crop lies outside the photo.
    """
    if padding not in PADDINGS:
        raise ConvloraError(f"padding is {padding!r}; one of {', '.join(PADDINGS)}")
    if size < 1:
        raise ConvloraError(f"size is {size}; a crop has at least one pixel")
    points = checked_landmarks(landmarks)
    if model is FACE:
        return _align_face(image, points, size, padding)
    fit = fit_pose(points, model, pitch_prior)
    step = fit.side / size
    corner = np.array(fit.centre) + 0.5 - fit.side / 2
    pixels, mask = _cut(image, corner, np.array([step, step]), size, padding, "LANCZOS")
    return Crop(pixels, mask, (points + 0.5 - corner) / step - 0.5)


def orthographic_fit(landmarks: ArrayLike, height: int) -> tuple[Points, float]:
    """Position (2,), y counted upwards from the lower edge, and scale in pixels per face unit of a scaled
    orthographic view of EG3D's mean face."""
    points = np.asarray(landmarks, np.float64).copy()
    points[:, 1] = height - 1 - points[:, 1]
    model = np.concatenate([np.array(FACE_POINTS), np.ones((5, 1))], 1)
    rows = np.linalg.lstsq(model, points, rcond=None)[0].T  # (2, 4): a, tx and b, ty
    return rows[:, 3], float(np.linalg.norm(rows[:, :3], axis=1).mean())


def window(position: Points, scale: float, photo: tuple[int, int], target: int, factor: float) -> Window:
    """Where EG3D cuts a `target` × `target` image with `factor` pixels per face unit from a photo (width, height)."""
    width, height = photo
    g = factor / scale
    w, h = int(width * g), int(height * g)
    left = int(w / 2 - target / 2 + (position[0] - width / 2) * g)
    top = int(h / 2 - target / 2 + (height / 2 - position[1]) * g)
    return Window(g, w, h, left, top)


def cut_window(image: RGB, cut: Window, target: int, padding: Padding = "black") -> tuple[RGB, NDArray[np.uint8]]:
    """The `target` × `target` pixels of a window, resized bicubically, and their mask."""
    from PIL import Image

    if min(cut.width, cut.height) < 1:
        raise AlbumError("the face is larger than can be: are the landmarks in pixels of this photo?")
    if cut.width * cut.height > _WHOLE:
        step = np.array(image.shape[1::-1]) / [cut.width, cut.height]
        return _cut(image, np.array([cut.left, cut.top]) * step, step, target, padding, "BICUBIC")
    resized = np.array(Image.fromarray(image).resize((cut.width, cut.height), Image.Resampling.BICUBIC))
    corner = np.array([cut.left, cut.top])
    first, last = np.maximum(-corner, 0), np.minimum([cut.width - cut.left, cut.height - cut.top], target)
    rows, columns = (slice(max(start, 0), max(start + target, 0)) for start in (cut.top, cut.left))
    return _padded(resized[rows, columns], first, last, target, padding)


def _align_face(image: RGB, points: Points, size: int, padding: Padding) -> Crop:
    from PIL import Image

    height, width = image.shape[:2]
    cut = window(*orthographic_fit(points, height), (width, height), _TARGET, _FACTOR)
    pixels, mask = cut_window(image, cut, _TARGET, padding)
    kept = slice(_MARGIN, _MARGIN + _KEPT)
    small, inside = (
        np.array(
            Image.fromarray(np.ascontiguousarray(plane[kept, kept])).resize((size, size), Image.Resampling.LANCZOS)
        )
        for plane in (pixels, mask)
    )
    moved = (points + 0.5) * [cut.width / width, cut.height / height] - [cut.left, cut.top] - _MARGIN
    # Near a border the filter mixes in what was padded.
    return Crop(small, np.where(inside >= 250, 255, 0).astype(np.uint8), moved * (size / _KEPT) - 0.5)


def _cut(
    image: RGB, corner: Points, step: Points, size: int, padding: Padding, resample: str
) -> tuple[RGB, NDArray[np.uint8]]:
    """size² pixels, each `step` pixels of the photo wide and high, from its `corner` (x, y), and their mask.

    Only the needed part is resampled, to what resizing the whole photo would give but for rounding.
    """
    from PIL import Image

    photo = np.array(image.shape[1::-1], np.float64)
    first = np.ceil(np.maximum(-corner / step, 0) - 1e-6).astype(int)
    last = np.floor(np.minimum((photo - corner) / step, size) + 1e-6).astype(int)
    if (last <= first).any():
        return _padded(image[:0], first, last, size, padding)
    start, end = np.clip(corner + first * step, 0, photo), np.clip(corner + last * step, 0, photo)
    width, height = (last - first).tolist()
    inner = Image.fromarray(image).resize((width, height), Image.Resampling[resample], box=(*start, *end))
    return _padded(np.array(inner), first, last, size, padding)


def _padded(
    inner: RGB, first: NDArray[np.int64], last: NDArray[np.int64], size: int, padding: Padding
) -> tuple[RGB, NDArray[np.uint8]]:
    """`inner` between the columns and rows `first` and `last` of size² pixels, and the mask of where it is."""
    if (last <= first).any():
        raise AlbumError("the crop around the face lies outside the photo: check its landmarks")
    margins = [(first[1], size - last[1]), (first[0], size - last[0])]
    mask = np.pad(np.full(inner.shape[:2], 255, np.uint8), margins)
    if padding == "black":
        return np.pad(inner, [*margins, (0, 0)]), mask
    return np.pad(inner, [*margins, (0, 0)], mode=_MODES[padding]), mask  # type: ignore[call-overload]


def face_region(landmarks: Points, size: int) -> NDArray[np.bool_]:
    """(size, size): the disc from the forehead to the chin, whose radius is the distance from eyes to mouth."""
    centre = landmarks.mean(0)
    eyes, mouth = landmarks[:2].mean(0), landmarks[3:].mean(0)
    radius = max(math.dist(eyes, mouth), math.dist(landmarks[0], landmarks[1]))
    at = np.arange(size)
    return np.asarray(np.square(at[None] - centre[0]) + np.square(at[:, None] - centre[1]) <= radius**2)
