"""Camera refinement: the correction's geometry, its gradients, and cameras found again."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_generator, tiny_photos, write_tiny_album

from convlora import cli
from convlora.errors import ConvloraError, FileError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.camera_refinement import (
    CameraPrior,
    angle_errors,
    coarse_correction,
    corrected,
    landmark_prior,
    moved_degrees,
)
from convlora.integrations.eg3d.losses import photo_loss, preview, reconstruct
from convlora.integrations.eg3d.personalize import inject_personal, parameter_groups, tune
from convlora.integrations.eg3d.prepare.face_model import FACE

ANGLE = st.floats(-0.4, 0.4)


def one(*values):
    return torch.tensor([values], dtype=torch.float64)


def view(yaw, pitch):
    label = cameras.label(cameras.look_at(math.pi / 2 + yaw, cameras.vertical_angle(pitch), dtype=torch.float64))
    return label


@settings(max_examples=60, deadline=None)
@given(ANGLE, ANGLE, st.lists(ANGLE, min_size=6, max_size=6))
def test_a_correction_keeps_a_camera_a_camera(yaw, pitch, values):
    label = view(yaw, pitch)
    torch.testing.assert_close(corrected(label, one(*[0.0] * 6)), label)
    for count in (3, 6):
        moved = corrected(label, one(*values[:count]))
        pose, intrinsics = cameras.split_label(moved)
        rotation = pose[0, :3, :3]
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(3, dtype=torch.float64))
        assert torch.linalg.det(rotation) > 0
        assert torch.equal(pose[0, 3], one(0, 0, 0, 1)[0]) and torch.equal(moved[:, 16:], label[:, 16:])
        if count == 3:
            torch.testing.assert_close(pose[0, :3, 3].norm(), one(2.7)[0, 0])


def test_yaw_pitch_and_roll_are_those_of_the_cameras():
    front = view(0.0, 0.0)
    torch.testing.assert_close(corrected(front, one(0.2, 0, 0)), view(0.2, 0.0))
    torch.testing.assert_close(corrected(front, one(0, 0.2, 0)), view(0.0, 0.2))
    errors = angle_errors(corrected(view(0.3, -0.1), one(0, 0, 0.1)), view(0.3, -0.1))
    torch.testing.assert_close(errors["roll"], torch.rad2deg(torch.tensor([0.1])))
    assert all(errors[name].abs() < 1e-4 for name in ("yaw", "pitch", "direction"))
    errors = angle_errors(view(0.25, 0.05), view(0.2, -0.05))
    torch.testing.assert_close(errors["yaw"], torch.rad2deg(torch.tensor([0.05])))
    torch.testing.assert_close(errors["pitch"], torch.rad2deg(torch.tensor([0.1])))
    behind = angle_errors(view(3.1, 0.0), view(-3.1, 0.0))
    assert abs(float(behind["yaw"])) < 5, "across the back"


@pytest.mark.parametrize(("column", "seen"), [(3, (0.6, 0.5)), (4, (0.5, 0.6))])
def test_the_origin_moves_in_the_picture_by_the_shift(column, seen):
    correction = one(0, 0, 0, 0, 0, 0)
    correction[0, column] = 0.1
    pose, intrinsics = cameras.split_label(corrected(view(0.2, 0.1), correction))
    local = pose[0, :3, :3].T @ -pose[0, :3, 3]
    pixel = intrinsics[0] @ (local / local[2])
    torch.testing.assert_close(pixel[:2], torch.tensor(seen, dtype=torch.float64))


def test_the_head_turns_clockwise_with_roll_and_shrinks_with_distance():
    above = torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)

    def seen(correction):
        pose, intrinsics = cameras.split_label(corrected(view(0.0, 0.0), correction))
        local = pose[0, :3, :3].T @ (above - pose[0, :3, 3])
        return (intrinsics[0] @ (local / local[2]))[:2] - 0.5

    assert seen(one(0, 0, 0.1))[0] > 0.01, "what is above goes to the right"
    ratio = seen(one(0, 0, 0, 0, 0, 0.1)).norm() / seen(one(0, 0, 0)).norm()
    assert abs(float(ratio) - math.exp(-0.1)) < 1e-6


def test_about_the_landmarks_a_face_stays_in_its_place():
    """The error of a camera from landmarks: other angles, the same place in the picture."""
    prior = landmark_prior(FACE.points3d)
    middle = torch.tensor(prior.pivot, dtype=torch.float64)
    assert abs(float(middle[0])) < 1e-3 and 0.1 < middle[2] < 0.4

    def seen(label):
        pose, intrinsics = cameras.split_label(label)
        local = pose[0, :3, :3].T @ (middle - pose[0, :3, 3])
        return (intrinsics[0] @ (local / local[2]))[:2]

    before, correction = view(0.2, 0.1), one(0.05, -0.2, 0.1)
    after = corrected(before, correction, prior.pivot)
    turned = angle_errors(after, before)["direction"]
    assert turned > 9
    # roll is about the optical axis, so it moves what is off the axis: by no more than its angle times the distance
    torch.testing.assert_close(seen(corrected(before, one(0.05, -0.2, 0), prior.pivot)), seen(before))
    assert (seen(after) - seen(before)).norm() < 0.1 * (seen(before) - 0.5).norm() + 1e-6
    assert (seen(corrected(before, correction)) - seen(before)).norm() > 0.05, "about the origin it does not"


def test_gradients_through_the_rays_are_those_of_differences():
    """In double precision: the renderer must pass on what a camera's movement does to every sample."""
    G, photos = tiny_generator().double(), tiny_photos(2)
    for option in ("depth_resolution", "depth_resolution_importance"):
        G.rendering_kwargs[option] = 8
    G.rendering_kwargs["depth_resolution_importance"] = 0  # the importance samples jump when weights change bins
    labels, target = photos.labels.double(), photos.images.double()
    w = torch.randn(2, G.w_dim, dtype=torch.float64)

    def loss(correction):
        return photo_loss(preview(G, w, corrected(labels, correction), 16), target, None).double().sum()

    at = (0.05 * torch.randn(2, 6, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(at), at)
    assert (gradient.abs() > 0).all()
    step = 1e-6
    for row in range(2):
        for column in range(6):
            offset = torch.zeros_like(at)
            offset[row, column] = step
            with torch.no_grad():
                difference = (loss(at + offset) - loss(at - offset)) / (2 * step)
            torch.testing.assert_close(gradient[row, column], difference, rtol=2e-2, atol=1e-6)


def test_the_coarse_search_takes_each_photos_own_best():
    truth = torch.cat([view(0.0, 0.15), view(0.1, -0.15), view(0.0, 0.0)]).float()
    given = torch.cat([view(0.0, 0.0), view(0.1, 0.0), view(0.0, 0.0)]).float()
    sigmas = CameraPrior(yaw=4, pitch=10).sigmas("rotation")
    found = coarse_correction(lambda labels: (labels - truth).square().sum(1), given, sigmas, 1e-6)
    before, after = moved_degrees(given, truth), moved_degrees(corrected(given, found * sigmas), truth)
    assert found.shape == (3, 3) and found[2].abs().max() == 0
    assert (after[:2] < before[:2] - 4).all()
    heavy = coarse_correction(lambda labels: (labels - truth).square().sum(1), given, sigmas, 1e6)
    assert heavy.abs().max() == 0, "the prior holds it"


@pytest.mark.parametrize(("refine", "steps"), [("rotation", 12), pytest.param("full", 40, marks=pytest.mark.slow)])
def test_turned_cameras_are_found_again(refine, steps):
    """Photos that the generator drew itself, w nearly known: only the cameras are wrong.

    A turn and a shift look much alike, so finding both takes longer.
    """
    G = eg3d.load_generator("lab").requires_grad_(False)
    labels = cameras.random_views(2, seed=2)
    w = G.mapping(torch.randn(2, G.z_dim), labels)[:, 0]
    with torch.no_grad():
        images = reconstruct(G, w, labels, deterministic=True)["image"]
    wrong = corrected(labels, torch.deg2rad(torch.tensor([[4.0, -9.0, 3.0], [-4.0, 9.0, -3.0]])))
    found = find_anchors(
        G, Photos(images, wrong, list("ab")), steps, init=w, lr=1e-3, refine_camera=refine, progress=False
    )
    before, after = angle_errors(wrong, labels), angle_errors(found.labels, labels)
    assert before["direction"].min() > 9 and after["direction"].max() < 2 and after["roll"].abs().max() < 1
    torch.testing.assert_close(found.moved_degrees, moved_degrees(wrong, found.labels))


def test_refined_anchors_are_kept_resumed_and_used(tmp_path, monkeypatch):
    G, photos = tiny_generator(), tiny_photos(4)
    arguments = dict(steps=4, lr=0.1, batch_size=2, refine_camera="rotation", progress=False)
    whole = find_anchors(G, photos, **arguments)
    assert whole.labels.shape == (4, 25) and whole.moved_degrees.shape == (4,) and whole.moved_degrees.max() > 0
    file = tmp_path / "anchors.safetensors"
    saved = Anchors.load(whole.save(file))
    assert torch.equal(saved.labels, whole.labels) and torch.equal(saved.moved_degrees, whole.moved_degrees)

    first = Anchors(whole.w[:2], whole.names[:2], whole.loss[:2], whole.labels[:2], whole.moved_degrees[:2])
    first.save(file)
    resumed = find_anchors(G, photos, **arguments, checkpoint=file)
    for a, b in zip(resumed, whole):
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    with pytest.raises(FileError, match="made with camera refinement"):
        find_anchors(G, photos, 4, progress=False, checkpoint=file)

    used = []
    module = sys.modules[tune.__module__]
    monkeypatch.setattr(module, "reconstruct", lambda G, w, c, **more: used.append(c) or reconstruct(G, w, c, **more))
    adapter = inject_personal(G)
    tune(G, photos, whole, parameter_groups(adapter, 0.01, 0.01), steps=1, batch_size=4, progress=False)
    assert {tuple(row) for row in used[0].tolist()} == {tuple(row) for row in whole.labels.tolist()}


def test_files_from_before_refinement_load(tmp_path):
    plain = find_anchors(tiny_generator(), tiny_photos(2), 1, progress=False)
    from convlora import files

    path = files.write(tmp_path / "old.safetensors", {"w": plain.w, "loss": plain.loss},
                       {"format": "convlora-anchors", "names": json.dumps(plain.names)})  # fmt: skip
    loaded = Anchors.load(path)
    assert loaded.labels is None and loaded.moved_degrees is None and torch.equal(loaded.w, plain.w)
    assert set(files.read(plain.save(tmp_path / "new.safetensors"))[0]) == {"w", "loss"}, "and new ones are the same"
    with pytest.raises(FileError, match="made without camera refinement"):
        find_anchors(tiny_generator(), tiny_photos(2), 1, refine_camera="full", checkpoint=path, progress=False)


def test_wrong_options_are_named():
    G, photos = tiny_generator(), tiny_photos(2)
    with pytest.raises(ConvloraError, match="'yaw'"):
        find_anchors(G, photos, 1, refine_camera="yaw")
    with pytest.raises(ConvloraError, match="standard deviations are positive"):
        find_anchors(G, photos, 1, refine_camera="full", camera_prior=CameraPrior(roll=0.0))
    with pytest.raises(ConvloraError, match=r"\(2, 3\) or \(2, 6\), not \(1, 3\)"):
        corrected(photos.labels, torch.zeros(1, 3))


@pytest.mark.parametrize(("manifest", "option", "refined"), [
    ({"face_model": "face"}, [], True), ({"face_model": "face"}, ["--refine-camera", "off"], False),
    ({}, [], False), ({}, ["--refine-camera", "full"], True),
])  # fmt: skip
def test_a_run_refines_where_cameras_are_estimates(tmp_path, capsys, manifest, option, refined):
    generator = eg3d.save_generator(tiny_generator(), tmp_path / "G.safetensors")
    album, out = write_tiny_album(tmp_path / "album", 5), tmp_path / "out"
    (album / "manifest.json").write_text(json.dumps({"consent": "she agreed", **manifest}))
    command = ["eg3d", "personalize", str(album), "--generator", str(generator), "--out", str(out), "--quiet"]
    command += "--held-out 2 --anchor-steps 2 --steps 2 --batch-size 2 --perceptual lab".split()
    assert cli.main([*command, *option]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    wanted = {"training photos", "held-out photos, pretrained", "held-out photos, LoRA rank 1"} if refined else set()
    assert set(report["moved_degrees"]) == wanted
    assert ("cameras  of training photos turned by" in printed) == refined == ("Cameras turned by" in page)
    for moved in report["moved_degrees"].values():
        assert moved["max"] == max(moved["photos"]) >= moved["mean"] > 0
    assert (Anchors.load(out / "anchors.safetensors").labels is not None) == refined
    assert cli.main(["inspect", str(out / "adapter.safetensors")]) == 0
    assert "consent: she agreed" in capsys.readouterr().out


def test_the_measurement_prepares_photos_as_a_user_would():
    pytest.importorskip("numba")
    from convlora.integrations.eg3d.lab import camera_error

    photos, truth = camera_error.prepared(3, 64)
    assert photos.images.shape == (3, 3, 64, 64) and photos.masks.shape == (3, 1, 64, 64) and truth.shape == (3, 25)
    errors = angle_errors(photos.labels, truth)
    assert 0.01 < errors["direction"].min() and errors["direction"].max() < 20
    exact, _ = camera_error.prepared(3, 64, noise=0.0)
    assert not torch.equal(exact.labels, photos.labels)
    text = camera_error.table(camera_error.Measured(errors, errors, torch.zeros(3), 6.0))
    assert f"{float(errors['pitch'].abs().median()):.2f}" in text and "2.0 s each" in text
    with pytest.raises(ConvloraError, match="0 photos"):
        camera_error.prepared(0, 64)


@pytest.mark.slow
def test_refinement_brings_landmark_cameras_closer_to_the_truth():
    pytest.importorskip("numba")
    from convlora.integrations.eg3d.lab import camera_error

    G = eg3d.load_generator("lab").requires_grad_(False)
    photos, truth = camera_error.prepared(4, G.img_resolution)
    measured = camera_error.measure(G, photos, truth, steps=20, progress=False)
    for angle in ("direction", "roll"):
        assert measured.after[angle].abs().mean() < 0.75 * measured.before[angle].abs().mean(), measured
