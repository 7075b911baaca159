"""`convlora eg3d check`: each mistake is named with its remedy, and albums without one pass."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import SIDE, tiny_generator, tiny_photos, write_tiny_album

from convlora import cli
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import find_anchors
from convlora.integrations.eg3d.camera_refinement import corrected
from convlora.integrations.eg3d.check import Fitting, check_album, check_photos
from convlora.integrations.eg3d.check.labels import check_labels, mirrored
from convlora.integrations.eg3d.check.pictures import check_values

FLIP = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
NAMES = [f"{i}.png" for i in range(8)]


def good(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    yaw, pitch = 0.22 * torch.randn(count, generator=generator), 0.1 * torch.randn(count, generator=generator)
    return cameras.label(cameras.look_at(math.pi / 2 + yaw, cameras.vertical_angle(pitch)))


def posed(labels, change):
    poses, intrinsics = cameras.split_label(labels)
    return cameras.label(change(poses), intrinsics)


def lens(labels, change):
    poses, intrinsics = cameras.split_label(labels.clone())
    change(intrinsics)
    return cameras.label(poses, intrinsics)


def errors(labels, names=NAMES, radius=2.7, box=1.0):
    return {f.check: f for f in check_labels(labels, names, radius, box)[0] if f.status in ("error", "warning")}


def scaled_rotation(poses):
    poses = poses.clone()
    poses[:, :3, :3] *= 1.3
    return poses


def far(poses):
    poses = poses.clone()
    poses[:, :3, 3] *= 1000
    return poses


MISTAKES = {
    "opengl": (lambda c: posed(c, lambda p: p @ FLIP), "convention", "OpenGL"),
    "world2cam": (lambda c: posed(c, torch.linalg.inv), "convention", "are world2cam:"),
    "world2cam, opengl": (lambda c: posed(c, lambda p: torch.linalg.inv(p @ FLIP)), "convention", "world2cam with"),
    "y down": (lambda c: posed(c, lambda p: FLIP @ p), "convention", "y axis points down"),
    "columns": (lambda c: posed(c, lambda p: p.mT), "layout", "column by column"),
    "half a mirror": (lambda c: posed(c, lambda p: p * torch.tensor([[-1.0], [1], [1], [1]])), "matrices", "−1"),
    "scaled": (lambda c: posed(c, scaled_rotation), "matrices", r"no rotations: .*scale 1.3"),
    "millimetres": (lambda c: posed(c, far), "radius", "2700 from the origin, this generator's 2.7"),
    "pixels": (lambda c: lens(c, lambda k: k.__imul__(torch.tensor([[224.0], [224], [1]]))), "intrinsics", "in pixels"),
    "deep3d focal": (lambda c: lens(c, lambda k: k.copy_(torch.tensor([[1015.0, 0, 112], [0, 1015, 112], [0, 0, 1]]))),
                     "intrinsics", "in pixels"),
    "unit focal": (lambda c: lens(c, lambda k: k[:, :2, :2].copy_(torch.eye(2))), "intrinsics", "boxes wide"),
    "negative focal": (lambda c: lens(c, lambda k: k[:, 1, 1].neg_()), "intrinsics", "negative"),
    "one camera": (lambda c: c[:1].repeat(8, 1), "variety", "same camera"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_labels_is_named_and_nothing_else(case):
    spoil, check, evidence = MISTAKES[case]
    found = errors(spoil(good()))
    assert list(found) == [check] and found[check].status == "error"
    assert re.search(evidence, found[check].evidence), found[check].evidence
    assert found[check].remedy
    if case == "deep3d focal":
        assert "1015 / 224 = 4.531" in found[check].remedy


@pytest.mark.parametrize("case", ["opengl", "world2cam", "world2cam, opengl", "y down", "columns", "millimetres"])
def test_what_is_certain_is_undone_for_the_pictures(case):
    repaired = check_labels(MISTAKES[case][0](good()), NAMES, 2.7, 1.0)[1]
    torch.testing.assert_close(repaired, good(), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 12), st.sampled_from([0.0, 0.05, 0.2]), st.booleans())
def test_good_labels_raise_no_alarm(seed, count, pivot, digits):
    generator = torch.Generator().manual_seed(seed)
    yaw, pitch, roll = 0.3 * torch.randn(3, count, generator=generator).clamp(-2, 2)
    c = cameras.label(cameras.look_at(math.pi / 2 + yaw, cameras.vertical_angle(pitch / 2), (0.0, 0.0, pivot)))
    c = corrected(c, torch.stack([torch.zeros_like(roll), torch.zeros_like(roll), roll], 1))
    if digits:
        c = (c * 1e5).round() / 1e5
    assert not errors(c, [f"{i}.png" for i in range(count)])


def test_cars_and_cats_raise_no_alarm():
    turn = torch.linspace(0, 6, 8)
    wide = torch.tensor([[1.0254, 0, 0.5], [0, 1.0254, 0.5], [0, 0, 1]])
    cars = cameras.label(cameras.look_at(turn, 1.0, radius=1.7), wide)
    assert not errors(cars, radius=1.7, box=1.6)
    cats = cameras.label(cameras.look_at(math.pi / 2 + torch.linspace(-0.4, 0.4, 8), 1.5, (0, 0, -0.06)))
    assert not errors(cats)


def test_some_wrong_among_many_are_a_warning():
    odd = good()
    odd[3, [3, 7, 11]] *= 1.2
    assert errors(odd)["radius"].status == "warning" and "3.png" in errors(odd)["radius"].evidence
    odd = good()
    odd[3] = posed(odd[3:4], lambda p: p @ FLIP)
    assert errors(odd)["convention"].status == "warning"
    odd = good()
    odd[2, 18] = 0.7
    assert errors(odd)["intrinsics"].status == "warning"


def test_mirrored_copies_need_mirrored_poses():
    c = good(2)
    both = torch.cat([c, mirrored(c)])
    names = ["a.png", "b.png", "a_mirror.png", "b_mirror.png"]
    assert not errors(both, names)
    found = errors(torch.cat([c, c]), names)
    assert "2 of 2 _mirror photos" in found["mirrored copies"].evidence
    torch.testing.assert_close(mirrored(mirrored(c)), c)
    for axis in (0, 1):
        pose = cameras.split_label(mirrored(c, axis))[0]
        torch.testing.assert_close(torch.linalg.det(pose[:, :3, :3]), torch.ones(2))


@pytest.mark.parametrize(("change", "status", "evidence"), [
    (lambda x: x, "ok", "brightness"),
    (lambda x: (x + 1) / 255 - 1, "error", "nearly black"),
    (lambda x: (x / 2 + 1.5) / 2, "error", "washed out"),
    (lambda x: torch.where(x < 0.1, -1.0, x), "error", "0 or 255"),
])  # fmt: skip
def test_the_range_of_values(change, status, evidence):
    x = torch.rand(4, 3, 32, 32) * 1.8 - 0.9
    found = check_values(Photos(change(x), good(4), NAMES[:4]))
    assert found.status == status and evidence in found.evidence


# ---- albums and the command ----------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    folder = write_tiny_album(tmp_path / "album", 6)
    rewrite(folder, lambda c: good(6))
    return folder


def rewrite(folder, change):
    content = json.loads((folder / "dataset.json").read_text())
    names, labels = zip(*content["labels"])
    changed = change(torch.tensor(labels)).tolist()
    (folder / "dataset.json").write_text(json.dumps({"labels": list(zip(names, changed))}))


@pytest.mark.parametrize(("shape", "status", "words"), [
    ((1, 6, 8), "ok", ""), ((1, 1, 8), "ok", ""), ((8,), "ok", ""),
    ((1, 18, 8), "error", "18 latents, this generator takes 6 (18 are those of a StyleGAN2 of 1024 pixels)"),
    ((1, 6, 512), "error", "w of 512 numbers, this generator's has 8"),
])  # fmt: skip
def test_latents_of_another_generator_are_named(album, shape, status, words):
    G = tiny_generator()
    assert (G.num_ws, G.w_dim) == (6, 8)
    np.save(album / "photo_00_latent.npy", np.zeros(shape, np.float32))
    found = check_album(G, album, fast=True)[-1]
    assert found.status == status and found.check == "latents photo_00_latent.npy"
    assert words in found.evidence


def test_broken_latents_and_foreign_anchors(album):
    G = tiny_generator()
    (album / "a.npy").write_bytes(b"\x80\x04no")
    find_anchors(G, tiny_photos(6), 1, progress=False).save(album / "b.safetensors")
    other = replace(tiny_photos(2), names=["x.png", "y.png"])
    find_anchors(G, other, 1, progress=False).save(album / "c.safetensors")
    eg3d.save_generator(G, album / "d.safetensors")
    found = {f.check: f for f in check_album(G, album, fast=True)}
    assert found["latents a.npy"].status == "error" and "not readable" in found["latents a.npy"].evidence
    assert found["latents b.safetensors"].status == "ok"
    assert "of x.png, which is not in the album" in found["latents c.safetensors"].evidence
    assert found["latents d.safetensors"].status == "not tested"


def test_the_command_reports_and_exits_with_1_for_a_mistake(album, tmp_path, capsys):
    generator = str(eg3d.save_generator(tiny_generator(), tmp_path / "G.safetensors"))
    command = ["eg3d", "check", generator, str(album), "--fast"]
    assert cli.main(command) == 0
    assert "no mistake found" in capsys.readouterr().out
    rewrite(album, lambda c: posed(c, lambda p: p @ FLIP))
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert "OpenGL" in printed and "→ negate the second and third column" in printed and "1 mistake found" in printed
    assert cli.main([*command, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["mistakes"] == 1
    assert [f["check"] for f in data["findings"] if f["status"] == "error"] == ["convention"]
    (album / "dataset.json").unlink()
    assert cli.main(command) == 2 and "has no dataset.json" in capsys.readouterr().err
    assert cli.main([*command, "--photos", "1"]) == 2


def test_the_inversions_run_on_any_generator(album):
    """What they find on random weights means nothing; that all of them report does."""
    Image.new("L", (SIDE, SIDE), 255).save((album / "masks").mkdir() or album / "masks" / "photo_01.png")
    found = check_album(tiny_generator(), album, fitting=Fitting(steps=2), progress=False)
    assert {f.check for f in found} >= {"left and right", "up and down", "colours", "order", "framing"}


# ---- the lab's heads -----------------------------------------------------------------------------------------------


def lab_photos(who):
    pytest.importorskip("numba")
    from convlora.integrations.eg3d import lab

    person = [lab.PERSON_A, *lab.evaluation_people(6)][who]
    shot = lab.photos(person, "train", 12, 128)
    return Photos(shot.images, shot.labels, [f"{i}.png" for i in range(12)])


def lab_findings(photos, steps, count):
    from convlora.integrations.eg3d import lab

    G = eg3d.load_generator("lab").requires_grad_(False)
    fitting = Fitting(lab.w_encoder(G), lab.networks.perceptual_distance, steps)
    found = check_photos(G, photos, fitting=fitting, count=count, progress=False)
    return {f.check: f for f in found}


def wrong(found):
    return {name for name, finding in found.items() if finding.status in ("error", "warning")}


def test_mirrored_poses_are_seen_in_the_pictures():
    photos = lab_photos(1)
    found = lab_findings(Photos(photos.images, mirrored(photos.labels), photos.names), 3, 4)
    assert wrong(found) == {"left and right"}, found
    assert "better on 4 of 4 photos" in found["left and right"].evidence


@pytest.mark.slow
@pytest.mark.parametrize("who", range(5))
def test_albums_of_other_people_raise_no_alarm(who):
    found = lab_findings(lab_photos(who), 8, 6)
    assert not wrong(found), found
    assert all(f.status == "ok" for f in found.values()), found


def shifted(photos):
    return Photos(photos.images.roll(11, 3), photos.labels, photos.names)


def enlarged(photos):
    large = torch.nn.functional.interpolate(photos.images, scale_factor=1.3, mode="bilinear")
    return Photos(large[:, :, 19 : 19 + 128, 19 : 19 + 128], photos.labels, photos.names)


def shuffled(photos):
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(1))
    return Photos(photos.images, photos.labels[order], photos.names)


PICTURES = {
    "bgr": (lambda p: Photos(p.images.flip(1), p.labels, p.names), "colours", "red and blue are exchanged"),
    "shuffled": (shuffled, "order", "a photo's own camera fits"),
    "shifted": (shifted, "framing", "to the right"),
    "enlarged": (enlarged, "framing", "times as large"),
    "opengl too": (lambda p: Photos(p.images.flip(1), posed(p.labels, lambda c: c @ FLIP), p.names), "colours", "red"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", PICTURES)
def test_a_mistake_in_the_pictures_is_named(case):
    spoil, check, evidence = PICTURES[case]
    found = lab_findings(spoil(lab_photos(0)), 8, 6)
    assert wrong(found) - {"convention"} == {check}, found
    assert evidence in found[check].evidence


def test_pictures_whose_values_are_wrong_are_not_compared():
    photos = tiny_photos(4)
    dark = Photos(photos.images / 255 - 1, good(4), photos.names)
    found = {f.check: f for f in check_photos(tiny_generator(), dark, progress=False)}
    assert found["values"].status == "error" and found["order"].status == "not tested"
