"""Camera refinement: a photo's camera is a measurement with errors, corrected together with its latent.

EG3D's cameras of photographs come from a face model fitted to landmarks; where the fit is off, w bends the head to
make up for it. Here a small correction of every camera is optimised with w by the same photometric loss, held back
by a Gaussian prior on the error of the measurement (maximum a posteriori). Gradients reach it through the rays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras

Refine = Literal["rotation", "full"]

#: (yaw, pitch) of the hypotheses that `coarse_correction` compares, in standard deviations.
GRID = tuple((yaw, pitch) for yaw in (0.0, -1.5, 1.5) for pitch in (0.0, -0.75, 0.75, -1.5, 1.5))


class CameraPrior(NamedTuple):
    """Standard deviations of the error that a given camera has, and the world point about which it turns.

    From five landmarks pitch is the weakest: noses differ in length as much as nodding changes them. A camera fitted
    to landmarks has them in the right place of the picture whatever its angles are, so its error is a rotation about
    the face, not about the world's origin behind it: `pivot` is the middle of the landmarks. Turned about the
    origin, the face would leave its place, which costs more than a better angle gains.
    """

    yaw: float = 4.0  # degrees
    pitch: float = 10.0
    roll: float = 3.0
    shift: float = 0.02  # of the head in the picture, as a share of the picture's side
    distance: float = 0.05  # relative
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def sigmas(self, refine: Refine) -> Tensor:
        """(3,) for "rotation": yaw, pitch, roll in radians; (6,) for "full": then shift x and y, log distance.

        Raises `ConvloraError` for another `refine`, or a deviation that is not positive.
        """
        if refine not in ("rotation", "full"):
            raise ConvloraError(f'refine_camera must be "rotation", "full" or None, not {refine!r}')
        if not all(0 < value < float("inf") for value in self[:5]):
            raise ConvloraError(f"{self}: standard deviations are positive numbers; a small one holds an angle still")
        angles = torch.deg2rad(torch.tensor(self[:3], dtype=torch.float32))
        rest = torch.tensor([self.shift, self.shift, self.distance])
        return angles if refine == "rotation" else torch.cat([angles, rest])


def landmark_prior(points3d: Sequence[Sequence[float]]) -> CameraPrior:
    """The prior of cameras that were fitted to the landmarks points3d, (x, y, z) each in the world."""
    x, y, z = (sum(axis) / len(points3d) for axis in zip(*points3d))
    return CameraPrior(pivot=(x, y, z))


def corrected(labels: Tensor, correction: Tensor, pivot: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    """Labels (N, 25) with their cameras moved by `correction` (N, 3) or (N, 6); zeros change nothing.

    The columns: yaw and pitch, radians, turn camera and position about the world point `pivot`, around the camera's own
    down and right axes, so that there is no pole (near the horizon larger yaw moves to +x, larger pitch up, as in
    `cameras`); roll, radians, is about the optical axis, larger turns the head in the picture clockwise. Then shift x
    and y, by which the world's origin moves right and down in the picture, in shares of its side, and the log of the
    distance's factor. Intrinsics stay. Differentiable in both arguments.
    """
    if list(correction.shape) not in ([len(labels), 3], [len(labels), 6]):
        raise ConvloraError(
            f"correction must be ({len(labels)}, 3) or ({len(labels)}, 6), not {tuple(correction.shape)}"
        )
    cam2world, intrinsics = cameras.split_label(labels)
    rotation, origin = cam2world[:, :3, :3], cam2world[:, :3, 3:]
    yaw, pitch, roll = correction[:, :3].unbind(1)
    turn = _turn(-pitch, 0) @ _turn(-yaw, 1)
    centre = origin.new_tensor(pivot)[:, None]
    origin = centre + rotation @ (turn @ (rotation.mT @ (origin - centre)))
    rotation = rotation @ turn @ _turn(-roll, 2)
    if correction.shape[1] == 6:
        shift, log_distance = correction[:, 3:5], correction[:, 5, None, None]
        origin = origin * log_distance.exp()
        sideways = shift / torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], 1)
        sideways = torch.cat([sideways, torch.zeros_like(sideways[:, :1])], 1)[..., None]
        origin = origin - rotation @ (sideways * origin.norm(dim=1, keepdim=True))
    pose = torch.cat([torch.cat([rotation, origin], 2), cam2world[:, 3:]], 1)
    return torch.cat([pose.flatten(1), labels[:, 16:]], 1)


def _turn(angle: Tensor, axis: int) -> Tensor:
    """(N, 3, 3) right-handed rotations by angle (N,) about a coordinate axis."""
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    rows = {
        0: (one, zero, zero, zero, cos, -sin, zero, sin, cos),
        1: (cos, zero, sin, zero, one, zero, -sin, zero, cos),
        2: (cos, -sin, zero, sin, cos, zero, zero, zero, one),
    }[axis]
    return torch.stack(rows, 1).view(-1, 3, 3)


@torch.no_grad()
def coarse_correction(
    score: Callable[[Tensor], Tensor],
    labels: Tensor,
    sigmas: Tensor,
    weight: float,
    pivot: Sequence[float] = (0.0, 0.0, 0.0),
) -> Tensor:
    """The best of a small grid of corrections for each photo, (N, K) in units of `sigmas` (K,).

    Gradients follow the nearest minimum only, and pitch may be off by more than its basin is wide. `score`
    gives the loss (N,) of every photo with the cameras labels (N, 25); `weight` times the squared correction is
    added. A hypothesis is one batch.
    """
    best, correction = labels.new_full((len(labels),), torch.inf), labels.new_zeros(len(labels), len(sigmas))
    for yaw, pitch in GRID:
        offset = torch.zeros_like(correction)
        offset[:, 0], offset[:, 1] = yaw, pitch
        found = score(corrected(labels, offset * sigmas, pivot)) + weight * offset.square().sum(1)
        correction = torch.where((found < best)[:, None], offset, correction)
        best = torch.minimum(found, best)
    return correction


def moved_degrees(before: Tensor, after: Tensor) -> Tensor:
    """(N,): the angle in degrees between the viewing directions of two sets of labels (N, 25)."""
    a, b = (cameras.split_label(labels.double())[0][:, :3, 2] for labels in (before, after))
    # the arc tangent stays accurate where the arc cosine of nearly 1 is not
    cross, dot = torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1)
    return torch.rad2deg(torch.atan2(cross, dot)).float()


def angle_errors(labels: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Degrees (N,) by which cameras labels (N, 25) are off the true ones.

    `yaw`, `pitch` and `direction` are of the camera's position as seen from the world's origin, `roll` is about the
    optical axis; the first two and roll carry a sign.
    """
    (a, _), (b, _) = cameras.split_label(labels.double()), cameras.split_label(truth.double())
    position, true_position = (torch.nn.functional.normalize(pose[:, :3, 3], dim=1) for pose in (a, b))
    yaw, true_yaw = (torch.atan2(p[:, 0], p[:, 2]) for p in (position, true_position))
    pitch, true_pitch = (p[:, 1].clamp(-1, 1).asin() for p in (position, true_position))
    between = b[:, :3, :3].mT @ a[:, :3, :3]
    cross, dot = torch.linalg.cross(position, true_position).norm(dim=1), (position * true_position).sum(1)
    found = {
        "yaw": torch.remainder(yaw - true_yaw + torch.pi, 2 * torch.pi) - torch.pi,
        "pitch": pitch - true_pitch,
        "roll": torch.atan2(between[:, 0, 1] - between[:, 1, 0], between[:, 0, 0] + between[:, 1, 1]),
        "direction": torch.atan2(cross, dot),
    }
    return {name: torch.rad2deg(angle).float() for name, angle in found.items()}
