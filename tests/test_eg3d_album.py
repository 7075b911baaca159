"""Albums: what EG3D writes is read; what is wrong is named, with the file and what to do."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tiny import SIDE, tiny_photos, write_tiny_album

from convlora.errors import AlbumError
from convlora.integrations.eg3d.album import load_album


@pytest.fixture
def album(tmp_path):
    return write_tiny_album(tmp_path / "album", 6)


def edit(album, **changes):
    content = json.loads((album / "dataset.json").read_text())
    (album / "dataset.json").write_text(json.dumps({**content, **changes}))


def labels(album):
    return json.loads((album / "dataset.json").read_text())["labels"]


def test_photos_cameras_and_names_stay_together(album):
    edit(album, labels=labels(album)[::-1])  # matched by name, never by position
    loaded, truth = load_album(album, SIDE), tiny_photos(6)
    assert loaded.train.names == truth.names and len(loaded.test) == 0 and not loaded.procedural
    torch.testing.assert_close(loaded.train.images, truth.images, atol=1 / 127, rtol=0)
    torch.testing.assert_close(loaded.train.labels, truth.labels)


def test_held_out_photos_are_spread_and_kept_apart(album):
    loaded = load_album(album, SIDE, held_out=2)
    assert loaded.test.names == ["photo_00.png", "photo_03.png"]
    assert loaded.train.names == ["photo_01.png", "photo_02.png", "photo_04.png", "photo_05.png"]


def test_a_manifest_splits_and_names_the_person(album):
    split = {"train": ["photo_05.png"], "test": ["photo_01.png"]}
    (album / "manifest.json").write_text(json.dumps({"person": "B", "procedural": True, "split": split}))
    loaded = load_album(album, SIDE)
    assert (loaded.train.names, loaded.test.names, loaded.person) == (["photo_05.png"], ["photo_01.png"], "B")
    assert loaded.procedural


def test_larger_photos_are_reduced(album):
    for path in album.glob("*.png"):
        Image.open(path).resize((2 * SIDE, 2 * SIDE)).save(path)
    torch.testing.assert_close(load_album(album, SIDE).train.images, tiny_photos(6).images, atol=0.03, rtol=0)


SPOILED = {
    "no folder": (lambda a: a.rename(a.with_name("gone")), "no album folder"),
    "no photos": (lambda a: [p.unlink() for p in a.glob("*.png")], "holds no photos"),
    "no cameras": (lambda a: (a / "dataset.json").unlink(), "has no dataset.json with the cameras of its 6 photos"),
    "damaged json": (lambda a: (a / "dataset.json").write_text('{"labels": ['), "not readable JSON"),
    "no labels": (lambda a: (a / "dataset.json").write_text("{}"), "has no .labels."),
    "photo without camera": (lambda a: edit(a, labels=labels(a)[1:]), "has no camera for photo_00.png: add its label"),
    "camera without photo": (lambda a: (a / "photo_02.png").unlink(), "names photo_02.png, not in .*: add the photo"),
    "24 numbers": (lambda a: edit(a, labels=[[n, c[:24]] for n, c in labels(a)]), "photo_00.png has 24 camera numbers"),
    "not a number": (lambda a: edit(a, labels=[[n, ["x"]] for n, _ in labels(a)]), r"this entry is not \[file,"),
    "unreadable": (lambda a: (a / "photo_01.png").write_bytes(b"no picture"), "photo_01.png"),
    "truncated": (
        lambda a: (a / "photo_01.png").write_bytes((a / "photo_01.png").read_bytes()[:120]), "photo_01.png"),
    "grey": (lambda a: Image.open(a / "photo_01.png").convert("L").save(a / "photo_01.png"), r"photo_01.png.*\bL\b"),
    "alpha": (lambda a: Image.open(a / "photo_01.png").convert("RGBA").save(a / "photo_01.png"), "RGBA"),
    "not square": (lambda a: Image.new("RGB", (200, 130)).save(a / "photo_01.png"), "is 200 × 130; .*square"),
    "too small": (lambda a: Image.new("RGB", (64, 64)).save(a / "photo_01.png"), "needs at least 128 × 128"),
    "unknown split": (
        lambda a: (a / "manifest.json").write_text('{"split": {"train": ["x.png"]}}'), "splits x.png, not in"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_album_is_refused(album, case):
    spoil, message = SPOILED[case]
    spoil(album)
    with pytest.raises(AlbumError, match=message):
        load_album(album, SIDE)


def test_nothing_left_to_train_on(album):
    with pytest.raises(AlbumError, match="held_out=6 of 6 photos"):
        load_album(album, SIDE, held_out=6)
