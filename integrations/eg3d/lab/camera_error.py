"""Measure cameras: how far those from landmarks are off, and what photometric refinement leaves of it.

python -m convlora.integrations.eg3d.lab.camera_error --photos 24

One photo each of people that nothing was trained on, drawn somewhere in a larger frame with its true camera known and
landmarks with an error of a pixel, is aligned and given a camera as `convlora eg3d prepare` does, and is then inverted
with and without refinement.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convlora.cpu import prepare_cpu
from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import find_anchors
from convlora.integrations.eg3d.camera_refinement import Refine, angle_errors, landmark_prior
from convlora.integrations.eg3d.checkpoint import load_generator
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.lab import networks, people
from convlora.integrations.eg3d.lab.encoder import w_encoder
from convlora.integrations.eg3d.lab.in_the_wild import LAB_MODEL, wild_photos
from convlora.integrations.eg3d.prepare.align import align
from convlora.integrations.eg3d.prepare.pose import pose_from_landmarks
from convlora.integrations.eg3d.run_folder import write_text

ANGLES = ("yaw", "pitch", "roll", "direction")


class Measured(NamedTuple):
    """Degrees each camera is off, by angle, before and after refinement; the loss (N,) of the inversions; seconds."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    loss: Tensor
    seconds: float


def prepared(count: int, resolution: int, noise: float = 1.0) -> tuple[Photos, Tensor]:
    """`count` aligned photos (at most 200) of as many unseen people with cameras from landmarks, and the true labels.

    The true camera is that of the crop: it looks at what the crop's middle shows, from EG3D's radius.
    """
    if not 1 <= count <= 200:
        raise ConvloraError(f"{count} photos: choose 1 to 200")
    images, masks, labels, truth, names = [], [], [], [], []
    for shot in wild_photos(people.evaluation_people(count), seed=0, noise=noise):
        crop = align(shot.image, shot.landmarks, shot.face_model, resolution)
        pose, _ = pose_from_landmarks(crop.landmarks, shot.face_model, resolution)
        images.append(torch.from_numpy(crop.image).permute(2, 0, 1).float() / 127.5 - 1)
        masks.append(torch.from_numpy(crop.mask)[None].float() / 255)
        labels.append(cameras.label(pose)[0])
        truth.append(cameras.label(shot.cam2world_true)[0])
        names.append(shot.name)
    return Photos(torch.stack(images), torch.stack(labels), names, torch.stack(masks)), torch.stack(truth)


def measure(
    G: TriPlaneGenerator, photos: Photos, truth: Tensor, refine: Refine = "full", steps: int = 80,
    progress: bool = True,
) -> Measured:  # fmt: skip
    """Refine the cameras of `photos` as a run in the lab would, and compare with `truth` (N, 25) before and after."""
    start = time.monotonic()
    found = find_anchors(
        G, photos, steps, init=w_encoder(G), perceptual=networks.perceptual_distance, lr=0.05, refine_camera=refine,
        camera_prior=landmark_prior(LAB_MODEL.points3d), progress=progress,
    )  # fmt: skip
    assert found.labels is not None
    seconds = time.monotonic() - start
    return Measured(angle_errors(photos.labels, truth), angle_errors(found.labels, truth), found.loss, seconds)


def table(measured: Measured) -> str:
    """Medians and 90 % quantiles of the absolute errors in degrees."""
    lines = [f"{'degrees off':12} {'before: median':>15} {'90 %':>6} {'after: median':>15} {'90 %':>6}"]
    for name in ANGLES:
        cells = [float(e[name].abs().quantile(q)) for e in (measured.before, measured.after) for q in (0.5, 0.9)]
        lines.append(f"{name:12} {cells[0]:15.2f} {cells[1]:6.2f} {cells[2]:15.2f} {cells[3]:6.2f}")
    count = len(measured.loss)
    return "\n".join([*lines, f"{count} photos, {measured.seconds:.0f} s, {measured.seconds / count:.1f} s each"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=24, metavar="N")
    parser.add_argument("--refine", choices=["rotation", "full"], default="full")
    parser.add_argument("--steps", type=int, default=80, metavar="N")
    parser.add_argument("--out", type=Path, help="write every photo's errors here as JSON")
    options = parser.parse_args()
    prepare_cpu()
    G = load_generator("lab").requires_grad_(False)
    photos, truth = prepared(options.photos, G.img_resolution)
    measured = measure(G, photos, truth, options.refine, options.steps)
    print(table(measured))
    if options.out:
        each = {when: {k: v.tolist() for k, v in errors.items()} for when, errors in
                (("before", measured.before), ("after", measured.after))}  # fmt: skip
        write_text(options.out, json.dumps({"photos": photos.names, **each}, indent=1))


if __name__ == "__main__":
    main()
