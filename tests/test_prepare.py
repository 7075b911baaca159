"""From photos to an album: what is kept, what is left out and why, and that a second call does nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from test_prepare_pose import camera, project
from tiny import SIDE as SIDE_OF_TINY
from tiny import write_tiny_album

from convlora import cli
from convlora.errors import AlbumError, ConvloraError
from convlora.integrations import eg3d
from convlora.integrations.eg3d.album import load_album
from convlora.integrations.eg3d.prepare import LAB, Face, LandmarkFile, Limits, copy_aligned, fit_pose
from convlora.integrations.eg3d.prepare import build as build_module
from convlora.integrations.eg3d.prepare.manifest import spread_over
from convlora.integrations.eg3d.prepare.person import largest_face, main_person

WIDTH, HEIGHT, SIDE = 320, 240, 200  # of a frame, and of the crop around a face in it
RED, BLUE = (200, 60, 50), (50, 70, 200)


def face_at(x: float, y: float, side: float = SIDE, yaw: float = 0.0) -> np.ndarray:
    """Landmarks of the lab's mean head, seen from `yaw`."""
    return (project(LAB, camera(LAB, yaw, 0, 0), 1) + 0.5) * side + [x - side / 2, y - side / 2]


def snap(path: Path, people: Sequence[tuple[tuple[int, int, int], float, float, float]], seed: int) -> list[np.ndarray]:
    """A frame of rough noise with a rough disc of each person's colour; returns their landmarks."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (15, 20, 3)).astype(np.uint8)).resize((WIDTH, HEIGHT))
    image = np.array(coarse).astype(float)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for colour, x, y, side in people:
        image[np.hypot(columns - x, rows - y) < side / 2] = colour
    image += rng.normal(0, 12, image.shape)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return [face_at(x, y, side, yaw=20 * rng.uniform(-1, 1)) for _, x, y, side in people]


def write_landmarks(path: Path, faces: dict[str, list[np.ndarray]]) -> LandmarkFile:
    path.write_text(json.dumps({name: [points.tolist() for points in found] for name, found in faces.items()}))
    return LandmarkFile(path)


@pytest.fixture
def photos(tmp_path):
    """Five photos of one person and their landmarks."""
    folder = tmp_path / "photos"
    folder.mkdir()
    faces = {f"p{i}.png": snap(folder / f"p{i}.png", [(RED, 150 + 5 * i, 115, SIDE)], i) for i in range(5)}
    return folder, write_landmarks(tmp_path / "faces.json", faces), faces


OPTIONS = {"species": "lab", "size": 64, "progress": False}


def test_photos_become_an_album_that_loads(photos, tmp_path):
    folder, detector, faces = photos
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = eg3d.prepare(
        folder, tmp_path / "album", detector=detector, held_out=2, person="Red", consent="Red agreed", **OPTIONS
    )
    assert len(done.train) == 3 and len(done.test) == 2 and done.rejected == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "album" / ".work").exists()
    album = load_album(tmp_path / "album", 64)
    assert album.train.names == done.train and album.test.names == done.test
    assert album.person == "Red" and album.consent == "Red agreed" and album.procedural and album.estimated_cameras
    manifest = json.loads((tmp_path / "album" / "manifest.json").read_text())
    assert manifest["format"] == "convlora-album" and manifest["face_model"] == "lab"
    for at, (source, name) in enumerate(zip(sorted(faces), sorted([*done.train, *done.test]))):
        assert name == f"{at:04d}_p{at}.png"
        entry = manifest["photos"][name]
        assert entry["source"] == source
        assert np.abs(np.array(entry["landmarks_in_photo"]) - faces[source][0]).max() < 1e-3
        fit = fit_pose(faces[source][0], LAB)
        assert abs(entry["yaw"] - fit.angles.yaw) < 0.2 and abs(entry["roll"]) < 0.2
    # the disc of the person's colour fills the middle of each crop
    middle = album.train.images[:, :, 24:40, 24:40].mean((0, 2, 3)) * 127.5 + 127.5
    assert np.abs(middle.numpy() - RED).max() < 8
    with Image.open(tmp_path / "album" / "contact_sheet.png") as sheet:
        assert sheet.width > 5 * 192 and np.array(sheet).std() > 20


def test_padded_photos_have_masks_that_load(photos, tmp_path):
    folder, _, faces = photos
    faces["p0.png"] = snap(folder / "p0.png", [(RED, 85, 115, SIDE)], 9)
    detector = write_landmarks(tmp_path / "faces.json", faces)
    eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    assert (tmp_path / "album" / "masks" / "0000_p0.png").is_file()
    album = load_album(tmp_path / "album", 64)
    assert album.train.masks is not None and 0.01 < 1 - album.train.masks[0].mean() < 0.2
    manifest = json.loads((tmp_path / "album" / "manifest.json").read_text())
    assert manifest["photos"]["0000_p0.png"]["padded"] == pytest.approx(
        1 - float(album.train.masks[0].mean()), abs=0.02
    )


def test_degraded_photos_are_left_out_with_the_reason(photos, tmp_path):
    folder, _, faces = photos
    picture, points = Image.open(folder / "p0.png"), faces["p0.png"][0]
    picture.filter(ImageFilter.GaussianBlur(4)).save(folder / "q_blurred.png")
    picture.resize((80, 60)).save(folder / "q_tiny.png")
    picture.crop((120, 0, 320, 240)).save(folder / "q_cropped.png")
    picture.resize((640, 480)).save(folder / "q_again.png")
    snap(folder / "q_nobody.png", [], 77)
    snap(folder / "q_turned.png", [(RED, 160, 120, SIDE)], 78)
    snap(folder / "q_odd.png", [(RED, 160, 120, SIDE)], 79)
    (folder / "q_broken.png").write_bytes(b"no picture")
    odd = points.copy()
    odd[2] += [0, 60]  # the nose below the mouth
    faces |= {
        "q_blurred.png": [points], "q_tiny.png": [points / 4], "q_cropped.png": [points - [120, 0]],
        "q_again.png": [points * 2], "q_turned.png": [face_at(160, 120, yaw=65)], "q_odd.png": [odd],
    }  # fmt: skip
    faces["q_cropped.png"][0] = faces["q_cropped.png"][0].clip(0, None)
    detector = write_landmarks(tmp_path / "faces.json", faces)
    done = eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    reasons = dict(done.rejected)
    expected = {
        "q_blurred.png": "blurred: sharpness", "q_tiny.png": r"the face is small: the eyes are 10 pixels apart",
        "q_cropped.png": "% of the face lies outside the photo", "q_again.png": "a duplicate of p0.png",
        "q_nobody.png": "no face was found", "q_turned.png": "turned too far: yaw 6",
        "q_odd.png": "fit no view of a face", "q_broken.png": "q_broken.png is not a readable picture",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name], (name, reasons[name])
    assert len(done.train) == 5

    kept = eg3d.prepare(folder, tmp_path / "all", detector=detector, keep_all=True, **OPTIONS)
    assert [name for name, _ in kept.rejected] == ["q_broken.png", "q_nobody.png"]
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    warned = {entry["source"]: entry["warnings"] for entry in manifest["photos"].values() if "warnings" in entry}
    assert warned.keys() == reasons.keys() - {"q_broken.png", "q_nobody.png"}
    assert "blurred" in warned["q_blurred.png"][0]


def colour_encoder(images: torch.Tensor) -> torch.Tensor:
    """An identity encoder for people who differ in colour alone."""
    middle = images[:, :, images.shape[2] // 3 : -images.shape[2] // 3, images.shape[3] // 3 : -images.shape[3] // 3]
    return torch.nn.functional.normalize(middle.mean((2, 3)), dim=1)


def test_several_faces_need_an_identity_and_with_it_the_person_is_found(photos, tmp_path):
    folder, _, faces = photos
    # Red and blue, equally large; red alone in the five others. And blue alone.
    faces["r_both.png"] = snap(folder / "r_both.png", [(BLUE, 75, 120, 130), (RED, 235, 120, 130)], 20)
    faces["r_blue.png"] = snap(folder / "r_blue.png", [(BLUE, 160, 120, SIDE)], 21)
    detector = write_landmarks(tmp_path / "faces.json", faces)
    done = eg3d.prepare(folder, tmp_path / "without", detector=detector, **OPTIONS)
    assert dict(done.rejected)["r_both.png"].startswith(
        "2 faces, none 2.5 times as large as the others: use --identity"
    )
    assert "0005_r_blue.png" in done.train  # nobody knows who that is

    small = Limits(eye_distance=20)
    done = eg3d.prepare(folder, tmp_path / "with", detector=detector, identity=colour_encoder, limits=small, **OPTIONS)
    assert dict(done.rejected) == {"r_blue.png": "not the person of the other photos"}
    manifest = json.loads((tmp_path / "with" / "manifest.json").read_text())
    chosen = np.array(manifest["photos"]["0006_r_both.png"]["landmarks_in_photo"])
    assert np.abs(chosen - faces["r_both.png"][1]).max() < 1e-3


def test_an_encoder_that_aligns_by_landmarks_gets_them(photos, tmp_path):
    folder, detector, _ = photos
    seen = []

    class Encoder:
        align = "5pt"

        def __call__(self, images, landmarks):
            seen.append(landmarks)
            return colour_encoder(images)

    eg3d.prepare(folder, tmp_path / "album", detector=detector, identity=Encoder(), **OPTIONS)
    assert seen[0].shape == (5, 5, 2)
    fit = fit_pose(seen[0][0].numpy(), LAB)
    assert fit.side == pytest.approx(64, rel=0.01)  # in pixels of the crop


def test_a_small_face_in_the_background_does_not_matter():
    large, small, similar = (Face((0, 0, side, side), face_at(0, 0)) for side in (100, 50, 80))
    assert largest_face([small, large]) == 1 and largest_face([large]) == 0
    assert largest_face([large, similar]) is None and largest_face([]) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(0, 100))
def test_the_main_person_is_found_in_any_order(count, seed):
    """Two strangers and the person at random places, the person in all photos but one."""
    rng = np.random.default_rng(seed)
    who, *strangers = np.linalg.qr(rng.normal(size=(8, 8)))[0][:, :4].T
    embeddings, truth = [], []
    for photo in range(count + 1):
        rows = [strangers[photo % 3] + 0.03 * rng.normal(size=8)]
        at = None
        if photo != 1:
            at = int(rng.integers(0, 2))
            rows.insert(at, who + 0.03 * rng.normal(size=8))
        embeddings.append(np.array([row / np.linalg.norm(row) for row in rows]))
        truth.append(at)
    areas = [[1.0] * len(rows) for rows in embeddings]
    appears = [sum(p % 3 == s for p in range(count + 1)) for s in range(3)]
    if max(appears) < count:
        assert main_person(embeddings, areas) == truth


def test_of_two_people_always_together_the_larger_is_taken_or_neither():
    a, b = np.eye(2)
    photos_ = [np.stack([a, b])] * 4
    assert main_person(photos_, [[3.0, 1.0]] * 4) == [0] * 4
    with pytest.raises(AlbumError, match="two people appear in 4 photos each, equally large"):
        main_person(photos_, [[1.0, 1.0]] * 4)
    assert main_person([np.zeros((0, 2))], [[]]) == [None]


def test_interrupted_it_goes_on_and_finished_it_does_nothing(photos, tmp_path, monkeypatch):
    folder, detector, _ = photos
    asked = []
    detect = LandmarkFile.detect

    def counting(self, image, name):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return detect(self, image, name)

    monkeypatch.setattr(LandmarkFile, "detect", counting)
    with pytest.raises(KeyboardInterrupt):
        eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    with pytest.raises(AlbumError, match=r"no folder|holds no photos|no dataset.json"):
        load_album(tmp_path / "album", 64)  # nothing that could be taken for an album
    first = eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    assert asked == ["p0.png", "p1.png", "p2.png", "p2.png", "p3.png", "p4.png"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "album").rglob("*.png")}
    again = eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    assert again == first and len(asked) == 6
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "album").rglob("*.png")}
    straight = eg3d.prepare(folder, tmp_path / "straight", detector=detector, **OPTIONS)
    for name in straight.train:
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "album" / name).read_bytes()
    with pytest.raises(AlbumError, match="is finished, with other choices .held_out: 0 there, 1 now"):
        eg3d.prepare(folder, tmp_path / "album", detector=detector, held_out=1, **OPTIONS)
    with pytest.raises(ConvloraError, match="other settings .size: 64 there, 128 now"):
        eg3d.prepare(folder, tmp_path / "album", detector=detector, species="lab", size=128, progress=False)


def test_stopped_while_the_files_are_written_nothing_stale_is_left(photos, tmp_path, monkeypatch):
    folder, detector, _ = photos
    write = build_module.save_sheet
    monkeypatch.setattr(build_module, "save_sheet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    monkeypatch.setattr(build_module, "save_sheet", write)
    done = eg3d.prepare(folder, tmp_path / "album", detector=detector, limits=Limits(yaw=5.0), **OPTIONS)
    assert 0 < len(done.train) < 5
    assert load_album(tmp_path / "album", 64).train.names == done.train


def test_a_damaged_manifest_is_named(photos, tmp_path):
    folder, detector, _ = photos
    done = eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    (tmp_path / "album" / "manifest.json").write_text('{"split": {')
    with pytest.raises(AlbumError, match="manifest.json is damaged .*remove it"):
        eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)
    (tmp_path / "album" / "manifest.json").unlink()
    assert eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS) == done


def test_one_photo_is_enough(photos, tmp_path):
    folder, detector, _ = photos
    done = eg3d.prepare(folder / "p3.png", tmp_path / "album", detector=detector, **OPTIONS)
    assert done.train == ["0000_p3.png"] and len(load_album(tmp_path / "album", 64).train) == 1
    beside = eg3d.prepare(folder / "p3.png", folder / "album", detector=detector, **OPTIONS)
    assert beside.train == done.train


def test_an_aligned_folder_is_said_to_be_one_and_copied(tmp_path):
    source = write_tiny_album(tmp_path / "aligned", 6)
    with pytest.raises(AlbumError, match="has a dataset.json: .*--aligned"):
        eg3d.prepare(source, tmp_path / "album", **OPTIONS)
    done = copy_aligned(source, tmp_path / "album", held_out=2, person="B", consent="yes")
    assert len(done.train) == 4 and len(done.test) == 2
    assert copy_aligned(source, tmp_path / "album", held_out=2, person="B", consent="yes") == done
    before, after = load_album(source, 64), load_album(tmp_path / "album", 64)
    assert after.consent == "yes" and not after.estimated_cameras
    found = {**dict(zip(after.train.names, after.train.labels)), **dict(zip(after.test.names, after.test.labels))}
    for name, label in zip(before.train.names, before.train.labels):
        assert torch.equal(found[name], label)
        assert (source / name).read_bytes() == (tmp_path / "album" / name).read_bytes()
    with pytest.raises(AlbumError, match="has no dataset.json, so its photos are not aligned"):
        (source / "dataset.json").unlink()
        copy_aligned(source, tmp_path / "other")


def test_an_aligned_folders_own_split_and_masks_stay(tmp_path):
    source = write_tiny_album(tmp_path / "aligned", 3)
    split = {"train": ["photo_02.png", "photo_00.png"], "test": ["photo_01.png"]}
    (source / "manifest.json").write_text(json.dumps({"person": "B", "split": split}))
    (source / "masks").mkdir()
    Image.new("L", (SIDE_OF_TINY, SIDE_OF_TINY), 255).save(source / "masks" / "photo_02.png")
    done = copy_aligned(source, tmp_path / "album")
    assert {"train": done.train, "test": done.test} == split
    album = load_album(tmp_path / "album", 64)
    assert album.person == "B" and album.train.masks is not None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=40, unique=True), st.data())
def test_held_out_photos_are_spread_over_yaw(yaws, data):
    held_out = data.draw(st.integers(1, len(yaws) - 1))
    test = spread_over(yaws, held_out)
    assert len(test) == held_out
    ranks = sorted(sorted(yaws).index(yaws[at]) for at in test)
    gaps = np.diff(ranks)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def refused(photos, tmp_path, **options):
    folder, detector, _ = photos
    eg3d.prepare(folder, tmp_path / "album", **{"detector": detector, **OPTIONS, **options})


def test_wrong_options_are_named(photos, tmp_path):
    folder, detector, _ = photos
    with pytest.raises(AlbumError, match="would lie inside the photos"):
        eg3d.prepare(folder, folder / "album", detector=detector, **OPTIONS)
    with pytest.raises(AlbumError, match="would lie inside the photos"):
        eg3d.prepare(folder, folder, detector=detector, **OPTIONS)
    with pytest.raises(AlbumError, match="lie inside the album"):
        eg3d.prepare(folder, folder.parent, detector=detector, **OPTIONS)
    with pytest.raises(ConvloraError, match="species is 'dog'"):
        refused(photos, tmp_path, species="dog")
    with pytest.raises(ConvloraError, match="no detector is known for cats: give their landmarks"):
        refused(photos, tmp_path, species="cat", detector=None)
    with pytest.raises(ConvloraError, match="padding is 'wrap'"):
        refused(photos, tmp_path, padding="wrap")
    with pytest.raises(ConvloraError, match="deviation of pitch is 0"):
        refused(photos, tmp_path, pitch_prior=(0.0, 0.0))
    with pytest.raises(ConvloraError, match="size=8"):
        refused(photos, tmp_path, size=8)
    with pytest.raises(AlbumError, match="held_out=5 of 5 usable photos"):
        refused(photos, tmp_path, held_out=5)
    assert refused(photos, tmp_path) is None  # and what was found before is used
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ConvloraError, match="holds other files"):
        eg3d.prepare(folder, tmp_path / "full", detector=detector, **OPTIONS)


def test_when_nothing_is_usable_every_photo_is_named(photos, tmp_path):
    folder, _, _ = photos
    detector = write_landmarks(tmp_path / "faces.json", {"other.png": [face_at(100, 100)]})
    with pytest.raises(AlbumError, match=r"none of the 5 photos can be used:\n  p0.png: no face was found\n  p1.png"):
        eg3d.prepare(folder, tmp_path / "album", detector=detector, **OPTIONS)


def test_the_command_line(photos, tmp_path, capsys):
    folder, detector, _ = photos
    (folder / "z.png").write_bytes(b"no picture")
    album = tmp_path / "album"
    given_ = ["eg3d", "prepare", str(folder), str(album), "--species", "lab", "--size", "64", "--quiet"]
    given_ += ["--landmarks", str(detector.path), "--held-out", "1", "--person", "Red"]
    assert cli.main(given_) == 0
    printed = capsys.readouterr().out
    assert "5 of 6 photos are in" in printed and "left out  z.png: " in printed and "contact_sheet.png" in printed
    assert "consent is not recorded" in printed
    assert cli.main([*given_, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["train"]) == 4 and len(answer["test"]) == 1 and answer["rejected"][0]["source"] == "z.png"
    assert cli.main([*given_, "--detector", "x.onnx"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert cli.main([*given_, "--aligned"]) == 2
    assert "--landmarks with --aligned" in capsys.readouterr().err
    aligned = write_tiny_album(tmp_path / "aligned", 3)
    assert cli.main(["eg3d", "prepare", str(aligned), str(tmp_path / "copy"), "--aligned", "--consent", "yes"]) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 photos" in printed and "consent is not recorded" not in printed


@pytest.mark.parametrize("first", ["prepare.pose", "personalize"])
def test_prepare_stays_a_function_whatever_is_imported_first(first):
    code = (
        f"import convlora.integrations.eg3d.{first}; from convlora.integrations import eg3d; "
        "print(*(type(f).__name__ for f in 2 * (eg3d.prepare, eg3d.personalize)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == 4 * ["function"], done.stderr


def test_lab_photos_in_the_wild_become_an_album(tmp_path):
    pytest.importorskip("numba")
    from convlora.integrations.eg3d import cameras
    from convlora.integrations.eg3d.lab.in_the_wild import wild_photos, write_wild
    from convlora.integrations.eg3d.lab.people import PERSON_A
    from convlora.integrations.eg3d.prepare import angles_of

    shots = wild_photos([PERSON_A], 0, frame=(480, 360), count=6)
    path = write_wild(shots, tmp_path / "photos")
    done = eg3d.prepare(
        tmp_path / "photos", tmp_path / "album", detector=LandmarkFile(path), species="lab", size=128, progress=False
    )
    assert len(done.train) == 6, done.rejected
    album = load_album(tmp_path / "album", 128)
    for shot, label in zip(shots, album.train.labels):
        got, truth = angles_of(cameras.split_label(label[None])[0][0]), angles_of(shot.cam2world_true)
        assert abs(got.yaw - truth.yaw) < 20 and abs(got.roll - truth.roll) < 8 and abs(got.pitch - truth.pitch) < 25
