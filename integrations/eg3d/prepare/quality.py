"""Which photos are fit to learn a face from: every measure a number, every refusal a sentence with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from convlora.integrations.eg3d.prepare.align import Crop, face_region
from convlora.integrations.eg3d.prepare.landmarks import RGB, Face
from convlora.integrations.eg3d.prepare.pose import Angles

_SIDE = 256  # of the crop at which sharpness is measured: photos of different resolution become comparable


@dataclass(frozen=True)
class Limits:
    """What a photo must keep to; docs/photos.md says where each number comes from.

    eye_distance: pixels in the photo. sharpness: `sharpness` of the crop. score: the detector's. residual: of the
    landmarks from any view of the mean face, as a share of the eye distance. padded: share of the face's disc outside
    the photo. yaw and pitch: degrees. duplicate: differing bits, of 256, of two photos' hashes.
    """

    eye_distance: float = 32.0
    sharpness: float = 8.0
    score: float = 0.7
    residual: float = 0.25
    padded: float = 0.1
    yaw: float = 50.0
    pitch: float = 35.0
    duplicate: int = 10


class Measures(NamedTuple):
    """What is measured of one face; see `Limits`."""

    score: float
    eye_distance: float
    sharpness: float
    residual: float
    padded: float
    angles: Angles


def measure(face: Face, crop: Crop, angles: Angles, residual: float) -> Measures:
    """The measures of a face and its aligned crop."""
    disc = face_region(crop.landmarks, len(crop.mask))
    padded = float((crop.mask[disc] == 0).mean()) if disc.any() else 1.0
    return Measures(face.score, face.eye_distance, sharpness(crop.image, disc), residual, padded, angles)


def faults(m: Measures, limits: Limits) -> list[str]:
    """Every reason against a photo, with the number and the limit; empty if there is none."""
    found = []
    if m.eye_distance < limits.eye_distance:
        found.append(
            f"the face is small: the eyes are {m.eye_distance:.0f} pixels apart (at least {limits.eye_distance:.0f})"
        )
    if m.sharpness < limits.sharpness:
        found.append(f"blurred: sharpness {m.sharpness:.1f} (at least {limits.sharpness:g})")
    if m.score < limits.score:
        found.append(f"the detector is unsure of the face: score {m.score:.2f} (at least {limits.score:g})")
    if m.residual > limits.residual:
        found.append(
            f"the landmarks fit no view of a face: off by {m.residual:.2f} of the eye distance "
            f"(at most {limits.residual:g}); covered, misplaced, or another species"
        )
    if m.padded > limits.padded:
        found.append(f"cropped: {m.padded:.0%} of the face lies outside the photo (at most {limits.padded:.0%})")
    for name, limit in (("yaw", limits.yaw), ("pitch", limits.pitch)):
        value = getattr(m.angles, name)
        if abs(value) > limit:
            found.append(f"turned too far: {name} {value:.0f}° (at most ±{limit:.0f}°)")
    return found


def sharpness(image: RGB, region: NDArray[np.bool_]) -> float:
    """Variance of the Laplacian inside a region of an aligned crop (S, S, 3), at 256 pixels per crop, grey 0..255.

    The crop is aligned, so that the same blur of the same face gives the same number whatever the photo's size.
    """
    from PIL import Image

    size = (_SIDE, _SIDE)
    grey = np.asarray(Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX), np.float64)
    inside = np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST))[1:-1, 1:-1]
    middle = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    return float(laplacian[inside].var()) if inside.any() else 0.0


def perceptual_hash(image: RGB) -> int:
    """256 bits: whether each pixel of the picture at 17 × 16 is brighter than its left neighbour ("difference hash").

    Of the whole photo, so that another expression before the same wall is another photo.
    """
    from PIL import Image

    grey = Image.fromarray(image).convert("L").resize((17, 16), Image.Resampling.LANCZOS)
    rows = np.asarray(grey, np.int16)
    return int.from_bytes(np.packbits(rows[:, 1:] > rows[:, :-1]).tobytes(), "big")


def differing_bits(a: int, b: int) -> int:
    """How many bits of two hashes differ."""
    return (a ^ b).bit_count()
