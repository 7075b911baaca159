"""Photos of procedural people as a camera would take them: the head anywhere in a larger frame, turned and scaled.

For the whole way from photos to a personal generator with the true cameras known. The frame is drawn as such, not
pasted from a square crop, so nothing is resampled and the surroundings are those of the scene.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convlora.errors import ConvloraError

from ..images import save_png
from ..prepare.face_model import LAB as LAB_MODEL
from ..prepare.face_model import FaceModel
from ..run_folder import write_text
from . import world
from .people import Person, _plan

__all__ = ["LAB_MODEL", "WildPhoto", "wild_photos", "write_wild"]

_STREAM = 30  # of random numbers, apart from those of people's photos

# The crop that the photo should become: its side as a share of the frame's shorter side, and its roll, in degrees.
SIDE = (0.5, 0.8)
ROLL, ROLL_LIMIT = 8.0, 25.0
_HEAD = 0.38  # half of the square around the crop's middle that holds the head, in crop sides


class WildPhoto(NamedTuple):
    """A frame and its truth.

    image: (H, W, 3) uint8. landmarks: (5, 2), pixels of the frame, y down, pixel centres at integers, with detector
    noise. cam2world_true: (4, 4) of the upright square crop around the head, OpenCV axes; the frame's rotation is
    its roll. face_model: the model to align with. name: a file name. crop: x, y of the crop's middle and its side,
    in pixels, as `PoseFit` has them.
    """

    image: NDArray[np.uint8]
    landmarks: NDArray[np.float64]
    cam2world_true: Tensor
    face_model: FaceModel
    name: str
    crop: tuple[float, float, float]


def wild_photos(
    people: Sequence[Person], seed: int, frame: tuple[int, int] = (640, 480), count: int = 1, noise: float = 1.0,
    split: str = "train", supersample: int = 1,
) -> list[WildPhoto]:  # fmt: skip
    """`count` photos of each person, in order, in frames of (width, height) pixels.

    Expression, light, background and camera are those of the person's own photos (`people.photos`); position, scale
    and roll come from `seed`, person and photo, not from how many are taken. `noise` is the standard deviation of
    the landmarks in pixels and direction.
    """
    width, height = frame
    if width < 64 or height < 64:
        raise ConvloraError(f"frame is {width} × {height}; a photo needs at least 64 × 64 pixels")
    return [
        shot
        for person in people
        for index, row in enumerate(zip(*_plan(person, split, count)))
        for shot in [_shot(person, index, seed, frame, noise, supersample, *row)]
    ]


def write_wild(photos: Sequence[WildPhoto], folder: str | Path) -> Path:
    """Write frames as PNG and `landmarks.json`, as `convlora eg3d prepare --landmarks` reads it; returns its path."""
    folder = Path(folder)
    for photo in photos:
        pixels = torch.from_numpy(photo.image).permute(2, 0, 1).float() / 127.5 - 1
        save_png(folder / photo.name, pixels)
    found = {photo.name: photo.landmarks.round(2).tolist() for photo in photos}
    write_text(folder / "landmarks.json", json.dumps(found, indent=1))
    return folder / "landmarks.json"


def _shot(
    person: Person, index: int, seed: int, frame: tuple[int, int], noise: float, supersample: int,
    label: Tensor, params: Tensor, traits: Tensor,
) -> WildPhoto:  # fmt: skip
    width, height = frame
    rng = np.random.default_rng(np.random.SeedSequence([seed, person.seed, index, _STREAM]))
    side = rng.uniform(*SIDE) * min(frame)
    roll = math.radians(float(np.clip(ROLL * rng.standard_normal(), -ROLL_LIMIT, ROLL_LIMIT)))
    middle = [rng.uniform(_HEAD * side, length - _HEAD * side) for length in frame]
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[math.cos(roll), math.sin(roll)], [-math.sin(roll), math.cos(roll)]])
    cam2world = label[:16].reshape(4, 4) @ turn
    corner = torch.tensor(middle) - side / 2

    u, v = (((torch.arange(n * supersample) + 0.5) / supersample - start) / side for n, start in zip(frame, corner))
    points = torch.stack(torch.meshgrid(v, u, indexing="ij")[::-1], -1).reshape(-1, 2)
    rgb = world.trace(params[None], traits[None], *world.rays_through(cam2world[None], None, points)).rgb
    rgb = rgb.reshape(height, supersample, width, supersample, 3).mean((1, 3))
    image = (rgb * 255).round().clamp(0, 255).byte().numpy()

    shares = world.landmarks(params[None], traits[None], cam2world[None], None)[0].double()
    landmarks = (corner + side * shares).numpy() - 0.5 + noise * rng.standard_normal((5, 2))
    name = f"{person.name.lower().replace(' ', '_')}_{index:03d}.png"
    return WildPhoto(image, landmarks, cam2world, LAB_MODEL, name, (middle[0] - 0.5, middle[1] - 0.5, side))
