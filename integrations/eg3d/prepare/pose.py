"""Head pose and framing from five landmarks, as a camera around a fixed head.

The fit. A camera looks at the model's centre from `radius`, turned by yaw and pitch; roll, scale and position in the
picture are a similarity of its image plane. For each yaw and pitch the best similarity has a closed form (a complex
number), so only two angles are searched, over a grid that then shrinks around its best cell.

The prior. Five points of one face tell pitch badly: a longer nose, a smile or a lowered jaw moves them as nodding
does, by tens of degrees on real photos. Pitch is therefore a maximum a posteriori estimate, and meant to be refined
photometrically against the generator (`find_anchors`, `refine_camera`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.prepare.face_model import FaceModel, Points

# Mean and standard deviation of pitch, degrees: people hold a camera near the height of their eyes.
PITCH_PRIOR = (0.0, 8.0)
#: Of a landmark from the model's, in each direction, as a share of the landmarks' root mean square spread.
NOISE = 0.1
YAW_LIMIT, PITCH_LIMIT = 80.0, 45.0

_STEP, _ROUNDS = 4.0, 34
_TURNS = 6  # of `pose_from_landmarks`; each leaves about a tenth of the error


class Angles(NamedTuple):
    """Degrees. yaw > 0: the camera stands to the world's +x. pitch > 0: above. roll > 0: the head in the picture is
    turned clockwise."""

    yaw: float
    pitch: float
    roll: float


class PoseFit(NamedTuple):
    """What `fit_pose` found.

    angles: in degrees. centre: (x, y) of the model's centre and side: length of the crop that has the model's focal
    length, both in pixels of the picture (pixel centres at integers). residual: root mean square distance of the
    landmarks from the model's, as a share of the distance between the eyes in the picture.
    """

    angles: Angles
    centre: tuple[float, float]
    side: float
    residual: float


def rotation(angles: Angles) -> Points:
    """(3, 3): columns are the camera's right, down and forward axes in the world."""
    yaw, pitch, roll = map(math.radians, angles)
    right, down, to_camera = _axes(np.array(yaw), np.array(pitch))
    turn = np.array([[math.cos(roll), math.sin(roll), 0], [-math.sin(roll), math.cos(roll), 0], [0, 0, 1]])
    return np.stack([right, down, -to_camera], -1) @ turn


def angles_of(cam2world: Tensor) -> Angles:
    """Yaw, pitch and roll of the viewing direction of one camera (4, 4), OpenCV axes."""
    axes = cam2world.detach().double().cpu().numpy()[:3, :3]
    to_camera = -axes[:, 2]
    yaw = math.atan2(to_camera[0], to_camera[2])
    pitch = math.asin(max(-1.0, min(1.0, to_camera[1])))
    right, down, _ = _axes(np.array(yaw), np.array(pitch))
    roll = math.atan2(-float(down @ axes[:, 0]), float(right @ axes[:, 0]))
    return Angles(math.degrees(yaw), math.degrees(pitch), math.degrees(roll))


def fit_pose(landmarks: ArrayLike, model: FaceModel, pitch_prior: tuple[float, float] | None = PITCH_PRIOR) -> PoseFit:
    """Pose and framing of the face with these landmarks (5, 2) in pixels, y down, in the order of the model's.

    pitch_prior: mean and standard deviation in degrees, None for none. Yaw stays within ±YAW_LIMIT, pitch within
    PITCH_LIMIT.

    Raises `ConvloraError`: landmarks of another shape, not finite, all in one place, or mirrored: the eyes exchanged,
    or y counted upwards.
    """
    z = _complex(checked_landmarks(landmarks))
    offset = z - z.mean()
    points = model.about_centre()
    low, high = np.radians([-YAW_LIMIT, -PITCH_LIMIT]), np.radians([YAW_LIMIT, PITCH_LIMIT])
    yaws = np.radians(np.arange(-YAW_LIMIT, YAW_LIMIT + 1, _STEP))
    pitches = np.radians(np.arange(-PITCH_LIMIT, PITCH_LIMIT + 1, _STEP))
    yaw, pitch = (grid.ravel() for grid in np.meshgrid(yaws, pitches))
    cost = _cost(yaw, pitch, offset, points, model, pitch_prior)
    best = np.array([yaw[cost.argmin()], pitch[cost.argmin()]])
    cell = np.linspace(-2, 2, 9)
    across, along = (grid.ravel() for grid in np.meshgrid(cell, cell))
    width = math.radians(_STEP)
    for _ in range(_ROUNDS):
        yaw, pitch = np.clip(best + width * np.stack([across, along], 1), low, high).T
        cost = _cost(yaw, pitch, offset, points, model, pitch_prior)
        best = np.array([yaw[cost.argmin()], pitch[cost.argmin()]])
        width *= 0.6
    q = _project(best[:1], best[1:], points, model)[0]
    scale, error = _similarity(q[None], offset)
    middle = z.mean() - scale[0] * q.mean()
    angles = Angles(math.degrees(best[0]), math.degrees(best[1]), float(np.degrees(np.angle(scale[0]))))
    residual = math.sqrt(float(error[0]) / len(z)) / float(abs(z[1] - z[0]))
    return PoseFit(angles, (float(middle.real), float(middle.imag)), float(abs(scale[0])), residual)


def pose_from_landmarks(
    landmarks: ArrayLike,
    model: FaceModel,
    image_size: int,
    pitch_prior: tuple[float, float] | None = PITCH_PRIOR,
) -> tuple[Tensor, Angles]:
    """cam2world (4, 4) of an aligned square photo from its landmarks (5, 2) in pixels, and its angles in degrees.

    The camera sees the model's five points where the landmarks are, as well as a turned, moved and scaled mean face
    can, with the model's focal length and a principal point of 0.5. Its distance from the origin is then set to
    `radius`, as EG3D does (its "orig" mode). OpenCV axes; `cameras.label` makes the 25 numbers. Raises as `fit_pose`.
    """
    points = checked_landmarks(landmarks)
    rays = np.concatenate([((points + 0.5) / image_size - 0.5) / model.focal, np.ones((5, 1))], 1)
    ahead, distance = np.array([0.0, 0.0, 1.0]), model.radius
    for _ in range(_TURNS):
        # Turned so that its axis meets the model's centre, the camera is one of those that `fit_pose` searches.
        turn = _turning(ahead)
        seen = rays @ turn.T
        fit = fit_pose(seen[:, :2] / seen[:, 2:] * model.focal, replace(model, radius=distance), pitch_prior)
        ahead = turn.T @ np.array([fit.centre[0] / model.focal, fit.centre[1] / model.focal, 1.0])
        ahead /= np.linalg.norm(ahead)
        distance /= fit.side
    axes = rotation(fit.angles)
    position = np.array(model.centre) - distance * axes[:, 2]
    pose = np.eye(4)
    pose[:3, :3] = axes @ turn
    pose[:3, 3] = position * (model.radius / np.linalg.norm(position))
    cam2world = torch.from_numpy(pose)
    return cam2world.float(), angles_of(cam2world)


def checked_landmarks(landmarks: ArrayLike) -> Points:
    """(5, 2) float64, or `ConvloraError` saying what is wrong with them."""
    points = np.asarray(landmarks, np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ConvloraError(
            f"landmarks must be five finite points (5, 2), got {points.shape}: image-left eye, image-right eye, nose "
            "tip, image-left and image-right mouth corner, each x and y in pixels"
        )
    left, right, _, mouth_left, mouth_right = points
    across, down = right - left, (mouth_left + mouth_right - left - right) / 2
    turn = across[0] * down[1] - across[1] * down[0]
    if abs(turn) < 1e-3 * (np.square(points - points.mean(0)).sum() + 1e-12):
        raise ConvloraError("the eyes and the middle of the mouth lie on one line: these are no landmarks of a face")
    if turn < 0:
        raise ConvloraError(
            "the landmarks are mirrored: the first eye and the first mouth corner must be those to the left in the "
            "image (the person's right), and y must count downwards from the upper edge"
        )
    return points


def _turning(direction: Points) -> Points:
    """(3, 3): the smallest rotation that takes a unit vector to the z axis."""
    x, y, z = direction
    return np.array(
        [[1 - x * x / (1 + z), -x * y / (1 + z), -x], [-x * y / (1 + z), 1 - y * y / (1 + z), -y], [x, y, z]]
    )


def _complex(points: Points) -> NDArray[np.complex128]:
    return points[..., 0] + 1j * points[..., 1]


def _axes(yaw: Points, pitch: Points) -> tuple[Points, Points, Points]:
    """Right, down, and the direction to the camera (…, 3) of cameras without roll."""
    sy, cy, sp, cp = np.sin(yaw), np.cos(yaw), np.sin(pitch), np.cos(pitch)
    right = np.stack([cy, np.zeros_like(sy), -sy], -1)
    down = np.stack([sp * sy, -cp, sp * cy], -1)
    return right, down, np.stack([cp * sy, sp, cp * cy], -1)


def _project(yaw: Points, pitch: Points, points: Points, model: FaceModel) -> NDArray[np.complex128]:
    """(K, 5): the model's points seen from K directions, x + iy in crop sides from the middle of the crop."""
    right, down, to_camera = _axes(yaw, pitch)
    depth = model.radius - to_camera @ points.T
    return np.asarray(model.focal * ((right + 1j * down) @ points.T) / depth, np.complex128)


def _similarity(q: NDArray[np.complex128], offset: NDArray[np.complex128]) -> tuple[NDArray[np.complex128], Points]:
    """The complex factors (K,) that take the centred q (K, 5) nearest to `offset` (5,), and the squared errors."""
    q = q - q.mean(1, keepdims=True)
    factor = (q.conj() @ offset) / np.square(np.abs(q)).sum(1)
    return factor, np.square(np.abs(offset - factor[:, None] * q)).sum(1)


def _cost(
    yaw: Points, pitch: Points, offset: NDArray[np.complex128], points: Points, model: FaceModel,
    pitch_prior: tuple[float, float] | None,
) -> Points:  # fmt: skip
    _, error = _similarity(_project(yaw, pitch, points, model), offset)
    spread = np.square(np.abs(offset)).mean()
    cost = error / (NOISE**2 * spread)
    if pitch_prior is not None:
        mean, deviation = np.radians(pitch_prior)
        cost = cost + np.square((pitch - mean) / deviation)
    return np.asarray(cost, np.float64)
