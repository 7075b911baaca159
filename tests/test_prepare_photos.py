"""Photos of every kind, landmark files of every kind, and what is said of the wrong ones."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from convlora.errors import AlbumError, ConvloraError
from convlora.integrations.eg3d.prepare import Face, LandmarkFile
from convlora.integrations.eg3d.prepare import landmarks as landmarks_module
from convlora.integrations.eg3d.prepare import photos as photos_module
from convlora.integrations.eg3d.prepare.landmarks import reduce_landmarks
from convlora.integrations.eg3d.prepare.photos import list_photos, read_photo

FIVE = [[30, 40], [60, 42], [45, 58], [34, 72], [58, 73]]
RAMP = np.linspace(0, 255, 100 * 80).reshape(100, 80)  # 80 wide, 100 high


def grey() -> Image.Image:
    return Image.fromarray(RAMP.astype(np.uint8))


def colour() -> Image.Image:
    return Image.fromarray(np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1).astype(np.uint8))


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_orientation_is_undone(tmp_path, turn):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what the camera did to the upright picture, as transpositions
    picture = colour() if turn == 1 else colour().transpose(Image.Transpose(undo[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "a.png"), np.array(colour()))


def test_harmless_kinds_are_converted(tmp_path):
    kinds = {
        "grey": grey(), "bits": grey().convert("1"), "palette": colour().convert("P"), "cmyk": colour().convert("CMYK"),
        "opaque": colour().convert("RGBA"), "rgb": colour(),
        "deep": Image.fromarray((RAMP * 257).astype(np.uint16)), "int": Image.fromarray((RAMP * 257).astype(np.int32)),
    }  # fmt: skip
    for name, picture in kinds.items():
        picture.save(tmp_path / f"{name}.tif")
        pixels = read_photo(tmp_path / f"{name}.tif")
        assert pixels.shape == (100, 80, 3) and pixels.dtype == np.uint8, name
    for name in ("grey", "deep", "int"):
        assert np.abs(read_photo(tmp_path / f"{name}.tif")[..., 1] - RAMP).max() <= 1, name
    assert np.array_equal(read_photo(tmp_path / "opaque.tif"), read_photo(tmp_path / "rgb.tif"))


def test_other_kinds_are_refused_with_the_reason(tmp_path, monkeypatch):
    see_through = colour().convert("RGBA")
    see_through.putpixel((3, 3), (1, 2, 3, 0))
    see_through.save(tmp_path / "glass.png")
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((RAMP * 1000).astype(np.int32)).save(tmp_path / "large.tif")
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    colour().save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:500])
    cases = {
        "glass.png": "glass.png is transparent in places", "float.tif": "floating-point", "large.tif": "up to 65535",
        "no.jpg": "no.jpg is not a readable picture", "cut.jpg": "cut.jpg is not a readable picture",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(AlbumError, match=message):
            read_photo(tmp_path / name)
    monkeypatch.setattr(photos_module, "MAX_PIXELS", 1000)
    colour().save(tmp_path / "huge.png")
    with pytest.raises(AlbumError, match="huge.png has 80 × 100 pixels, over the 1,000"):
        read_photo(tmp_path / "huge.png")


def test_heic_needs_its_plug_in_and_uses_it(tmp_path, monkeypatch):
    colour().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(AlbumError, match="pip install pillow-heif"):
        read_photo(tmp_path / "a.heic")
    registered = []
    plug_in = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", plug_in)
    assert read_photo(tmp_path / "a.heic").shape == (100, 80, 3) and registered


def test_which_files_are_photos(tmp_path):
    with pytest.raises(AlbumError, match="no folder of photos at"):
        list_photos(tmp_path / "gone")
    (tmp_path / "below").mkdir()
    with pytest.raises(AlbumError, match="holds no photos .*1 subfolders, which are not searched"):
        list_photos(tmp_path)
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.png", "c.heic"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_photos(tmp_path)] == ["a.png", "b.JPG", "c.heic"]
    assert list_photos(tmp_path / "b.JPG") == [tmp_path / "b.JPG"]


def many(count: int) -> list[list[float]]:
    """Points of which those that the reduction takes are FIVE."""
    points = np.random.default_rng(0).uniform(0, 80, (count, 2))
    for at, group in enumerate(landmarks_module.REDUCTIONS[count]):
        spread = np.linspace(-4, 4, len(group))[:, None] * [1, 0.1]
        points[list(group)] = np.array(FIVE[at]) + (spread - spread.mean(0))
    return points.tolist()


@pytest.mark.parametrize("count", [5, 68, 468, 478])
@pytest.mark.parametrize("kind", ["json", "csv", "csv with header"])
def test_landmark_files(tmp_path, count, kind):
    image = np.zeros((100, 80, 3), np.uint8)
    path = tmp_path / f"points.{kind[:4].strip()}"
    if kind == "json":
        deep = [[*point, 0.5] for point in many(count)]  # MediaPipe's have a z
        path.write_text(json.dumps({"a.jpg": deep if count > 400 else many(count), "two.jpg": [FIVE, FIVE]}))
    else:
        header = "name," + ",".join(f"x{i},y{i}" for i in range(count)) + "\n"
        row = ",".join(str(value) for point in many(count) for value in point)
        path.write_text((header if "header" in kind else "") + f"a.jpg,{row}\n\ntwo.jpg,{row}\ntwo.jpg,{row}\n")
    file = LandmarkFile(path)
    (face,) = file.detect(image, "a.jpg")
    assert isinstance(face, Face) and face.score == 1
    assert np.abs(face.landmarks - FIVE).max() < 1e-6
    assert face.eye_distance == pytest.approx(np.hypot(30, 2))
    assert len(file.detect(image, "two.jpg")) == 2 and file.detect(image, "b.jpg") == []
    assert file.missing(["a.jpg", "b.jpg"]) == ["b.jpg"]


BAD_FILES = {
    "gone.json": (None, "no landmark file at"),
    "points.txt": ("x", "read from .json or .csv, not .txt"),
    "broken.json": ("{", "not readable JSON"),
    "list.json": ("[1]", "must hold .*not a list"),
    "empty.json": ("{}", "holds no landmarks"),
    "six.json": (
        json.dumps({"a.jpg": [[1, 2]] * 6}),
        r"six.json: a.jpg: a face needs 5, 68, 468, 478 points .*\(6, 2\)",
    ),
    "words.json": (json.dumps({"a.jpg": [["x", "y"]] * 5}), "a.jpg: these are no points"),
    "ragged.json": (json.dumps({"a.jpg": [[1, 2], [3]]}), "a.jpg: these are no points"),
    "words.csv": ("a.jpg,1,2,3,4,5,6,7,8,9,10\nb.jpg,left,2", "line 2: not name,x1,y1"),
    "odd.csv": ("a.jpg,1,2,3", "line 1: a.jpg has 3 numbers, not pairs"),
    "binary.csv": (b"\xff\xfe\x00\xd8", "not readable text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_landmark_files_are_named(tmp_path, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AlbumError, match=message):
        LandmarkFile(tmp_path / name)


BAD_POINTS = {
    "shares": ((np.array(FIVE) / 100).tolist(), r"lie between 0 and 1: multiply x by the photo's width \(80\)"),
    "outside": ([*FIVE[:4], [58, 173]], r"the landmark \(58, 173\) of a.jpg lies outside its 80 × 100 pixels"),
    "mirrored": ([FIVE[i] for i in (1, 0, 2, 4, 3)], "a.jpg: the landmarks are mirrored"),
    "upwards": ([[x, 99 - y] for x, y in FIVE], "y must count downwards"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_points_are_named_with_their_photo(tmp_path, case):
    points, message = BAD_POINTS[case]
    (tmp_path / "p.json").write_text(json.dumps({"a.jpg": points}))
    with pytest.raises(AlbumError, match=message):
        LandmarkFile(tmp_path / "p.json").detect(np.zeros((100, 80, 3), np.uint8), "a.jpg")


def test_a_reduction_needs_points():
    with pytest.raises(ConvloraError, match="got an array of shape"):
        reduce_landmarks([1, 2, 3])
