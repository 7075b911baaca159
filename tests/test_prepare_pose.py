"""Head pose from five landmarks: exact where the landmarks are, steadied by a prior where they are not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import vectors

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.prepare import CAT, FACE, LAB, angles_of, face_model, fit_pose, pose_from_landmarks

SIZE = 512


def camera(model, yaw: float, pitch: float, roll: float) -> torch.Tensor:
    """cam2world (4, 4) looking at the model's centre, from `cameras.look_at` and a turned image plane."""
    h, v = math.pi / 2 + math.radians(yaw), cameras.vertical_angle(math.radians(pitch))
    pose = cameras.look_at(h, v, radius=model.radius, dtype=torch.float64)[0]
    turn = torch.eye(4, dtype=torch.float64)
    c, s = math.cos(math.radians(roll)), math.sin(math.radians(roll))
    turn[:2, :2] = torch.tensor([[c, s], [-s, c]])
    pose = pose @ turn
    pose[:3, 3] += torch.tensor(model.centre)
    return pose


def project(model, pose: torch.Tensor, size: int = SIZE) -> np.ndarray:
    """The model's points in a picture of `size` pixels, by the pinhole equation alone."""
    local = (torch.tensor(model.points3d, dtype=torch.float64) - pose[:3, 3]) @ pose[:3, :3]
    return ((local[:, :2] / local[:, 2:] * model.focal + 0.5) * size - 0.5).numpy()


angle = st.floats(-1, 1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([FACE, LAB, CAT]), angle, angle, angle)
def test_noise_free_landmarks_give_the_camera_back(model, yaw, pitch, roll):
    truth = camera(model, 60 * yaw, 30 * pitch, 45 * roll)
    got, angles = pose_from_landmarks(project(model, truth), model, SIZE, pitch_prior=None)
    assert np.abs(np.array(angles) - [60 * yaw, 30 * pitch, 45 * roll]).max() < 0.1
    torch.testing.assert_close(got[:3, :3], truth[:3, :3].float(), atol=1e-3, rtol=0)
    # EG3D puts the camera at the radius from the origin, whatever it looks at
    position = truth[:3, 3] * (model.radius / truth[:3, 3].norm())
    torch.testing.assert_close(got[:3, 3], position.float(), atol=2e-3, rtol=0)


@settings(max_examples=30, deadline=None)
@given(angle, angle, angle, st.floats(20, 4000), st.floats(-500, 500), st.floats(-500, 500))
def test_framing_is_found_wherever_the_face_is_in_the_photo(yaw, pitch, roll, side, x, y):
    truth = camera(LAB, 60 * yaw, 30 * pitch, 45 * roll)
    landmarks = project(LAB, truth, 1) * side + [x, y]  # size 1: from -0.5, in crop sides
    fit = fit_pose(landmarks, LAB, None)
    assert np.abs(np.array(fit.angles) - [60 * yaw, 30 * pitch, 45 * roll]).max() < 0.1
    assert fit.side == pytest.approx(side, rel=1e-4) and fit.residual < 1e-4
    assert np.abs(np.array(fit.centre) - [x, y]).max() < 1e-3 * side


def test_cameras_are_those_of_eg3ds_own_conversion():
    """The reference's labels come from pose coefficients; here from where its camera sees the mean face."""
    _, v = vectors("12_preprocess")
    for angle_, trans, label, mirrored in zip(v["angle"], v["trans"], v["label"], v["label_mirror"]):
        a, b, c = (float(x) for x in angle_)
        rx = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
        ry = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
        rz = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
        points = v["lm3d_std"].double().numpy() @ (rz @ ry @ rx).T + trans.double().numpy()
        shares = points[:, :2] / (10 - points[:, 2:]) * 1015 * (300 / 102) / 700  # x right, y up
        landmarks = (shares * [1, -1] + 0.5) * SIZE - 0.5
        pose, _ = pose_from_landmarks(landmarks, FACE, SIZE, pitch_prior=None)
        torch.testing.assert_close(cameras.label(pose)[0].double(), label, atol=2e-6, rtol=0)
        # The mirrored photo of the mirrored mean face (it is not quite symmetric), left and right exchanged.
        swap = [1, 0, 2, 4, 3]
        flipped = np.stack([SIZE - 1 - landmarks[:, 0], landmarks[:, 1]], 1)[swap]
        other = replace(FACE, points3d=tuple((-x, y, z) for x, y, z in (FACE.points3d[i] for i in swap)))
        pose, _ = pose_from_landmarks(flipped, other, SIZE, pitch_prior=None)
        torch.testing.assert_close(cameras.label(pose)[0].double(), mirrored, atol=2e-6, rtol=0)


def test_angles_have_the_signs_they_are_said_to_have():
    assert angles_of(camera(FACE, 20, 0, 0)).yaw == pytest.approx(20, abs=1e-4)
    right, above, clockwise = camera(FACE, 20, 0, 0), camera(FACE, 0, 20, 0), camera(FACE, 0, 0, 20)
    assert right[0, 3] > 0.5 and above[1, 3] > 0.5
    points = project(FACE, clockwise)
    assert points[1, 1] > points[0, 1] + 20  # the image-right eye is the lower one
    assert angles_of(above).pitch == pytest.approx(20, abs=1e-4)
    assert angles_of(clockwise).roll == pytest.approx(20, abs=1e-4)


def test_the_prior_pulls_pitch_to_its_mean_and_leaves_yaw_and_roll():
    landmarks = project(FACE, camera(FACE, 15, 12, 5))
    flat = fit_pose(landmarks, FACE, None).angles
    weak, strong = (fit_pose(landmarks, FACE, (0.0, deviation)).angles for deviation in (8.0, 1.0))
    assert flat.pitch > weak.pitch > strong.pitch > 0
    assert strong.pitch < 2
    assert abs(strong.yaw - flat.yaw) < 1.5 and abs(strong.roll - flat.roll) < 1.5
    assert fit_pose(landmarks, FACE, (12.0, 1.0)).angles.pitch == pytest.approx(12, abs=0.05)


def test_what_a_detector_saw_in_a_real_photo():
    """MTCNN's points in NASA's portrait of Eileen Collins: near frontal, but five points alone say 21° of pitch."""
    points = [[205.01, 101.73], [246.76, 103.71], [224.67, 128.96], [201.72, 139.25], [245.27, 141.86]]
    flat, prior = fit_pose(points, FACE, None), fit_pose(points, FACE)
    assert abs(prior.angles.yaw) < 6 and abs(prior.angles.roll) < 5
    assert prior.angles.pitch < 12 < flat.angles.pitch
    assert 0.05 < prior.residual < 0.15


WRONG = {
    "four points": ([[0, 0], [1, 0], [0.5, 1], [0, 2]], r"five finite points \(5, 2\), got \(4, 2\)"),
    "not finite": ([[0, 0], [1, 0], [0.5, 1], [0, 2], [1, float("nan")]], "five finite points"),
    "eyes exchanged": ([[10, 0], [0, 0], [5, 5], [10, 10], [0, 10]], "mirrored"),
    "y upwards": ([[0, 10], [10, 10], [5, 5], [0, 0], [10, 0]], "y must count downwards"),
    "one place": ([[3, 3]] * 5, "on one line"),
    "one line": ([[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]], "on one line"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_landmarks_are_named(case):
    points, message = WRONG[case]
    with pytest.raises(ConvloraError, match=message):
        fit_pose(points, FACE)


def test_an_unknown_species_names_the_known_ones():
    with pytest.raises(ConvloraError, match="species is 'dog'; one of face, cat, lab"):
        face_model("dog")


def test_the_labs_model_is_the_mean_of_its_heads():
    pytest.importorskip("numba")
    from convlora.integrations.eg3d.lab import world

    seeds = list(range(1024))
    params = torch.cat([world.sample_identity(seeds), world.sample_nuisance(seeds)], 1)
    mean = world.anchors3d(params, None).double().mean(0)
    torch.testing.assert_close(torch.tensor(LAB.points3d, dtype=torch.float64), mean, atol=6e-4, rtol=0)


def test_wild_photos_have_their_landmarks_and_cameras():
    pytest.importorskip("numba")
    from convlora.integrations.eg3d.lab.in_the_wild import wild_photos
    from convlora.integrations.eg3d.lab.people import evaluation_people

    people = evaluation_people(6)
    many = wild_photos(people, seed=3, frame=(160, 120), noise=0.0)
    again = wild_photos(people[2:3], seed=3, frame=(160, 120), noise=0.0)[0]
    assert np.array_equal(again.image, many[2].image) and np.array_equal(again.landmarks, many[2].landmarks)
    for shot in many:
        assert shot.image.shape == (120, 160, 3)
        x, y, side = shot.crop
        corner = np.array([x, y]) - side / 2
        fit = fit_pose(shot.landmarks, shot.face_model)
        truth = angles_of(shot.cam2world_true)
        assert abs(fit.angles.roll - truth.roll) < 8 and abs(fit.angles.yaw - truth.yaw) < 20
        assert np.hypot(fit.centre[0] - x, fit.centre[1] - y) < 0.1 * side
        assert ((shot.landmarks > corner) & (shot.landmarks < corner + side)).all()
    moved = wild_photos(people[:1], seed=4, frame=(160, 120), noise=0.0)[0]
    assert moved.crop != many[0].crop
    with pytest.raises(ConvloraError, match="at least 64 × 64"):
        wild_photos(people[:1], 0, frame=(20, 20))


def test_wild_photos_show_the_head_where_the_truth_says():
    """The upright crop around the true middle is the photo that the lab draws with the true camera."""
    pytest.importorskip("numba")
    from convlora.integrations.eg3d.lab import world
    from convlora.integrations.eg3d.lab.in_the_wild import wild_photos
    from convlora.integrations.eg3d.lab.people import PERSON_A, _plan
    from convlora.integrations.eg3d.prepare.align import _cut

    shot = wild_photos([PERSON_A], seed=0, frame=(240, 180), supersample=2)[0]
    x, y, side = shot.crop
    size = int(side)
    got, mask = _cut(shot.image, np.array([x, y]) + 0.5 - side / 2, np.full(2, side / size), size, "black", "BICUBIC")
    _, params, traits = _plan(PERSON_A, "train", 1)
    drawn = world.render(params, traits, shot.cam2world_true[None], None, size).image[0]
    want = ((drawn + 1) * 127.5).permute(1, 2, 0).numpy()
    inside = mask == 255
    assert np.abs(got[inside] - want[inside]).mean() < 4
