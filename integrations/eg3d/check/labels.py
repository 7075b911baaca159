"""Mistakes that the camera labels show by themselves: exact, and without rendering anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.check.finding import Finding

ORTHONORMAL = 1e-2  # of RᵀR from the identity: labels are written with six digits or more
LOOKS_AWAY = 15.0  # degrees from the direction of the world's origin; landmarks and pivots leave a few
RADIUS_TOLERANCE = 0.05  # relative
#: Width of the picture at the origin, in sides of the generator's box: FFHQ and cats 0.63, cars 1.04.
VIEW = (0.35, 1.5)

_FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


class Sight(NamedTuple):
    """How cameras (N, 4, 4) stand to the head: degrees (N,) off the origin, and whether up is up (N,)."""

    off: Tensor
    upright: Tensor


def check_labels(labels: Tensor, names: Sequence[str], radius: float, box: float) -> tuple[list[Finding], Tensor]:
    """Findings on labels (N, 25) of a generator whose cameras are at `radius` and whose box has the side `box`.

    Also returns the labels with those mistakes undone that are certain, so that pictures can be looked at with them.
    """
    poses, intrinsics = cameras.split_label(labels)
    lens, intrinsics = _intrinsics(intrinsics, radius, box)
    matrices, poses = _matrices(poses)
    if matrices.status == "error" and matrices.check == "matrices":
        rest = "the matrices are no camera poses"
        skipped = [Finding(name, "not tested", rest) for name in ("convention", "radius", "variety")]
        return [matrices, *skipped, *lens, *_mirror_pairs(labels, names)], torch.cat([poses.flatten(1), intrinsics], 1)
    convention, poses = _convention(poses)
    distance, poses = _radius(poses, names, radius)
    repaired = cameras.label(poses, intrinsics.view(-1, 3, 3))
    layout = [] if matrices.check == "matrices" else [matrices]
    fine = Finding("matrices", "ok", f"{len(labels)} rotations with determinant +1")
    return [
        *(layout or [fine]), convention, distance, _variety(poses), *lens, *_mirror_pairs(labels, names)
    ], repaired  # fmt: skip


def sight(poses: Tensor) -> Sight:
    to_origin, forward = F.normalize(-poses[:, :3, 3], dim=1), poses[:, :3, 2]
    off = torch.rad2deg(torch.atan2(torch.linalg.cross(to_origin, forward).norm(dim=1), (to_origin * forward).sum(1)))
    return Sight(off, poses[:, 1, 1] < 0)


def mirrored(labels: Tensor, axis: int = 0) -> Tensor:
    """Labels of the world mirrored along x (0) or y (1): S·P·S with S = diag(−1, 1, 1, 1), as EG3D has it for x."""
    flip = torch.ones(4, device=labels.device, dtype=labels.dtype)
    flip[axis] = -1
    poses, _ = cameras.split_label(labels)
    return torch.cat([(flip[:, None] * poses * flip).flatten(1), labels[:, 16:]], 1)


def yaws(labels: Tensor) -> Tensor:
    """Degrees (N,) by which the cameras stand to the world's +x side of its z axis."""
    position = cameras.split_label(labels)[0][:, :3, 3]
    return torch.rad2deg(torch.atan2(position[:, 0], position[:, 2]))


def _matrices(poses: Tensor) -> tuple[Finding, Tensor]:
    last = poses.new_tensor([0.0, 0.0, 0.0, 1.0])
    if bool(((poses[:, 3] - last).abs() > 1e-3).any()):
        if bool(((poses[:, :, 3] - last).abs() < 1e-3).all()):
            return Finding(
                "layout", "error",
                "numbers 4, 8 and 12 are 0 and 13 to 15 are not: the matrices are written column by column",
                "transpose every 4 × 4 matrix in dataset.json: EG3D writes them row by row",
            ), poses.mT.contiguous()  # fmt: skip
        row = ", ".join(f"{x:g}" for x in poses[:, 3][(poses[:, 3] - last).abs().amax(1).argmax()].tolist())
        return Finding(
            "matrices", "error", f"a last row is ({row}), not (0, 0, 0, 1)",
            "the first 16 numbers are a 4 × 4 cam2world matrix, row by row",
        ), poses  # fmt: skip
    rotation = poses[:, :3, :3]
    determinant = torch.linalg.det(rotation)
    squares = (rotation.mT @ rotation - torch.eye(3, device=poses.device)).abs().amax((1, 2))
    mirrored_count = int((determinant < 0).sum())
    if mirrored_count:
        return Finding(
            "matrices", "error", f"{mirrored_count} of {len(poses)} rotations have determinant −1: they mirror",
            "a mirrored photo has the pose S·P·S, with S = diag(−1, 1, 1, 1) on both sides, and a change of axes "
            "flips two of them, never one",
        ), poses  # fmt: skip
    if bool((squares > ORTHONORMAL).any()):
        worst = int(squares.argmax())
        scale = float(determinant[worst].abs() ** (1 / 3))
        return Finding(
            "matrices", "error",
            f"{int((squares > ORTHONORMAL).sum())} of {len(poses)} are no rotations: RᵀR is off the identity by up to "
            f"{float(squares.max()):.2g} (scale {scale:.3g})",
            "divide the upper left 3 × 3 part by its scale, or take the nearest rotation (U·Vᵀ of its SVD)",
        ), poses  # fmt: skip
    return Finding("matrices", "ok", ""), poses


def _convention(poses: Tensor) -> tuple[Finding, Tensor]:
    """Which reading of the matrices makes cameras look at the head with up upwards."""
    readings: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("", "", lambda p: p),
        ("camera axes are OpenGL's (y up, z backwards)",
         "negate the second and third column of every matrix: EG3D's axes are OpenCV's, y down and z forward",
         lambda p: p @ _FLIP.to(p)),
        ("the matrices are world2cam", "invert every matrix: EG3D's labels hold cam2world", _inverse),
        ("the matrices are world2cam with OpenGL's axes",
         "invert every matrix, then negate its second and third column",
         lambda p: _inverse(p) @ _FLIP.to(p)),
        ("the world's y axis points down", "turn the world: multiply every matrix by diag(1, −1, −1, 1) from the left",
         lambda p: _FLIP.to(p) @ p),
    ]  # fmt: skip
    given = sight(poses)
    degrees = float(given.off.median())
    share = float(given.upright.float().mean())
    if degrees <= LOOKS_AWAY and share > 0.5:
        # a frontal camera is its own inverse, and near it world2cam looks almost right: almost
        other = sight(_inverse(poses))
        fits = float(other.off.median()) < 0.34 * degrees and float(other.upright.float().mean()) > 0.5
        if degrees <= 3 or not fits:
            evidence = f"cameras look at the origin within {float(given.off.max()):.1f}°, heads are upright"
            if float(given.off.max()) > LOOKS_AWAY:
                far = int((given.off > LOOKS_AWAY).sum())
                return Finding(
                    "convention", "warning", f"{far} of {len(poses)} cameras look past the head by more than 15°",
                    "look at these photos: their pose estimate failed",
                ), poses  # fmt: skip
            return Finding("convention", "ok", evidence), poses
    for what, remedy, reading in readings[1:]:
        read = reading(poses)
        seen = sight(read)
        off = float(seen.off.median())
        in_front = float((read[:, 2, 3] > 0).float().mean())
        if off < min(LOOKS_AWAY, 0.5 * degrees + 1) and float(seen.upright.float().mean()) > 0.5 and in_front > 0.5:
            was = f"as they are, cameras look {degrees:.0f}° past the head" + ("" if share > 0.5 else ", upside down")
            return Finding("convention", "error", f"{what}: {was}; read so, {off:.1f}°", remedy), read
    return Finding(
        "convention", "error", f"cameras look {degrees:.0f}° past the origin, under no known convention at it",
        "labels need cam2world with OpenCV axes (x right, y down, z forward) in a world with y up, the head at the "
        "origin and its face towards +z",
    ), poses  # fmt: skip


def _inverse(poses: Tensor) -> Tensor:
    rotation = poses[:, :3, :3].mT
    top = torch.cat([rotation, -rotation @ poses[:, :3, 3:]], 2)
    return torch.cat([top, poses[:, 3:]], 1)


def _radius(poses: Tensor, names: Sequence[str], radius: float) -> tuple[Finding, Tensor]:
    distance = poses[:, :3, 3].norm(dim=1)
    middle = float(distance.median())
    if abs(middle / radius - 1) > RADIUS_TOLERANCE:
        repaired = poses.clone()
        repaired[:, :3, 3] *= radius / max(middle, 1e-12)
        return Finding(
            "radius", "error",
            f"cameras are {middle:.4g} from the origin, this generator's {radius:g}: {radius / max(middle, 1e-12):.3g} "
            "times as far",
            f"scale every translation to a length of {radius:g}: the units or the generator are others",
        ), repaired  # fmt: skip
    off = (distance / radius - 1).abs() > RADIUS_TOLERANCE
    if bool(off.any()):
        return Finding(
            "radius", "warning",
            f"{int(off.sum())} of {len(poses)} cameras are off {radius:g} by more than 5 %, such as "
            f"{names[int(off.float().argmax())]} at {float(distance[off][0]):.3g}",
            "estimate these poses again",
        ), poses  # fmt: skip
    between = f"{float(distance.min()):.3f} to {float(distance.max()):.3f}"
    return Finding("radius", "ok", f"{between}, as this generator's {radius:g}"), poses


def _variety(poses: Tensor) -> Finding:
    if len(poses) < 3:
        return Finding("variety", "not tested", f"{len(poses)} photos")
    directions = F.normalize(poses[:, :3, 3], dim=1)
    spread = torch.rad2deg((directions @ F.normalize(directions.mean(0), dim=0)).clamp(-1, 1).acos())
    if float(spread.max()) < 0.05:
        return Finding(
            "variety", "error", f"all {len(poses)} photos have the same camera",
            "dataset.json is a placeholder: estimate a pose for every photo (convlora eg3d prepare)",
        )  # fmt: skip
    return Finding("variety", "ok", f"viewing directions spread over {float(spread.max()):.0f}° about their mean")


def _intrinsics(k: Tensor, radius: float, box: float) -> tuple[list[Finding], Tensor]:
    fx, fy, cx, cy = k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2]
    focal, centre = float(fx.median()), float(cx.median())
    written = f"focal length {focal:.4g}, principal point ({centre:.3g}, {float(cy.median()):.3g})"
    ideal = cameras.ffhq_intrinsics(k.device).repeat(len(k), 1, 1)
    if focal > 20 or centre > 5:
        side = 2 * centre if centre > 5 else None
        how = f": {focal:.4g} / {side:.4g} = {focal / side:.4g}" if side else ""
        repaired = k.clone()
        repaired[:, :2] /= side or 1
        repaired = repaired if side and _sees(focal / side, radius, box) else ideal
        return [Finding(
            "intrinsics", "error", f"{written}: in pixels",
            f"divide the first two rows by the side of the photo they are for{how}; FFHQ's labels have 4.2647 and 0.5",
        )], repaired.flatten(1)  # fmt: skip
    if float(fx.min()) <= 0 or float(fy.min()) <= 0:
        return [Finding(
            "intrinsics", "error", f"a focal length is negative or 0 ({float(torch.minimum(fx, fy).min()):.4g})",
            "focal lengths are positive; y axes that point up are turned in the pose, not here",
        )], ideal.flatten(1)  # fmt: skip
    if not _sees(focal, radius, box):
        return [Finding(
            "intrinsics", "error",
            f"{written}: at radius {radius:g} the picture is {radius / focal / box:.2g} boxes wide",
            f"this generator's focal length is between {radius / VIEW[1] / box:.2g} and {radius / VIEW[0] / box:.2g} "
            "sides of a picture; FFHQ's and the cats' is 4.2647",
        )], ideal.flatten(1)  # fmt: skip
    if float((fx / fy - 1).abs().max()) > 0.02 or float(fx.max() / fx.min()) > 1.02:
        return [Finding(
            "intrinsics", "warning",
            f"focal lengths from {float(fx.min()):.4g} to {float(torch.maximum(fx, fy).max()):.4g}",
            "aligned crops of one size share one focal length",
        )], k.flatten(1)  # fmt: skip
    if max(float((cx - 0.5).abs().max()), float((cy - 0.5).abs().max())) > 0.05:
        return [Finding(
            "intrinsics", "warning", f"{written}: off the middle by more than 5 %",
            "aligned crops have a principal point of 0.5, 0.5",
        )], k.flatten(1)  # fmt: skip
    return [Finding("intrinsics", "ok", written)], k.flatten(1)


def _sees(focal: float, radius: float, box: float) -> bool:
    return VIEW[0] <= radius / focal / box <= VIEW[1]


def _mirror_pairs(labels: Tensor, names: Sequence[str]) -> list[Finding]:
    """A photo and its `_mirror` copy, as EG3D's preprocessing writes them, have mirrored poses."""
    at = {Path(name).stem: i for i, name in enumerate(names)}
    pairs = [(at[stem.removesuffix("_mirror")], i) for stem, i in at.items()
             if stem.endswith("_mirror") and stem.removesuffix("_mirror") in at]  # fmt: skip
    if not pairs:
        return []
    first, second = torch.tensor(pairs).T
    wrong = (mirrored(labels[first]) - labels[second])[:, :16].abs().amax(1) > 1e-2
    if bool(wrong.any()):
        return [Finding(
            "mirrored copies", "error", f"{int(wrong.sum())} of {len(pairs)} _mirror photos have no mirrored pose",
            "the copy's pose is S·P·S of the photo's, S = diag(−1, 1, 1, 1)",
        )]  # fmt: skip
    return [Finding("mirrored copies", "ok", f"{len(pairs)} pairs agree")]
