"""Photos become an album: faces found, aligned as EG3D does, with a camera each, and bad photos left out."""

from __future__ import annotations

from convlora.integrations.eg3d.prepare.align import Crop, align
from convlora.integrations.eg3d.prepare.aligned import copy_aligned
from convlora.integrations.eg3d.prepare.build import prepare
from convlora.integrations.eg3d.prepare.face_model import CAT, FACE, LAB, FaceModel, face_model
from convlora.integrations.eg3d.prepare.landmarks import Face, LandmarkDetector, LandmarkFile
from convlora.integrations.eg3d.prepare.manifest import Prepared
from convlora.integrations.eg3d.prepare.pose import Angles, PoseFit, angles_of, fit_pose, pose_from_landmarks
from convlora.integrations.eg3d.prepare.quality import Limits
from convlora.integrations.eg3d.prepare.yunet import YuNet

__all__ = [
    "CAT", "FACE", "LAB", "Angles", "Crop", "Face", "FaceModel", "LandmarkDetector", "LandmarkFile", "Limits",
    "PoseFit", "Prepared", "YuNet", "align", "angles_of", "copy_aligned", "face_model", "fit_pose",
    "pose_from_landmarks", "prepare",
]  # fmt: skip
