"""Five points of a mean face where a generator draws it: what landmarks in a photo are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.cameras import FOCAL, RADIUS

Points = NDArray[np.float64]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class FaceModel:
    """Where a generator's world has the five landmarks, and how its photos are framed.

    Args:
        name: what `--species` calls it.
        points3d: image-left eye, image-right eye, nose tip, image-left and image-right mouth corner of the mean
            frontal face, in world units (x to the viewer's right, y up, z to the viewer).
        focal: focal length of the crops in crop sides.
        radius: distance of the cameras from the world's origin.
        centre: the world point whose projection is the middle of a crop.
    """

    name: str
    points3d: tuple[Triple, Triple, Triple, Triple, Triple]
    focal: float = FOCAL
    radius: float = RADIUS
    centre: Triple = (0.0, 0.0, 0.0)

    def about_centre(self) -> Points:
        """(5, 3): the points relative to `centre`."""
        return np.array(self.points3d) - np.array(self.centre)


#: The mean face that EG3D aligns photos with (Deep3DFaceRecon's, eyes as means of two contour points), in its own
#: units; EG3D's world is 0.27 times these, moved by FACE_OFFSET.
FACE_POINTS: tuple[Triple, Triple, Triple, Triple, Triple] = (
    (-0.31148657, 0.29036078, 0.13377953),
    (0.30979887, 0.28972036, 0.13179526),
    (0.0032535, -0.04617932, 0.55244243),
    (-0.25216928, -0.38133916, 0.22405732),
    (0.2484662, -0.38128236, 0.22235769),
)
FACE_SCALE = 0.27
FACE_OFFSET: Triple = (0.0, 0.006, 0.161)


def _world(point: Triple) -> Triple:
    x, y, z = (FACE_SCALE * a + b for a, b in zip(point, FACE_OFFSET))
    return x, y, z


#: FFHQ's faces. The focal length is 2985.29 pixels of a 1024 image of which the middle 700 are kept.
FACE = FaceModel("face", tuple(map(_world, FACE_POINTS)), 2985.29 / 700, RADIUS, FACE_OFFSET)  # type: ignore[arg-type]

#: The lab's heads: means of `lab.anchors3d` over 4096 heads (tests/test_prepare_pose.py computes them again).
LAB = FaceModel(
    "lab",
    (
        (-0.0620, 0.0120, 0.1425),
        (0.0620, 0.0120, 0.1425),
        (0.0, -0.0481, 0.1860),
        (-0.0460, -0.1038, 0.1438),
        (0.0460, -0.1038, 0.1438),
    ),
)

#: Cats. No published 3-D landmarks go with EG3D's cat model: these proportions were set by hand and are unmeasured,
#: in a crop whose eyes lie a third of its side apart. Labels look at the origin from RADIUS, as AFHQ's do.
CAT = FaceModel(
    "cat",
    (
        (-0.100, 0.040, 0.080),
        (0.100, 0.040, 0.080),
        (0.0, -0.060, 0.160),
        (-0.050, -0.110, 0.110),
        (0.050, -0.110, 0.110),
    ),
)

MODELS = {model.name: model for model in (FACE, CAT, LAB)}


def face_model(name: str) -> FaceModel:
    """The model called `name`: "face", "cat" or "lab"."""
    if name not in MODELS:
        raise ConvloraError(f"species is {name!r}; one of {', '.join(MODELS)}")
    return MODELS[name]
