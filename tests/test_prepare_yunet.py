"""A real detector on a real photo: NASA's portrait of Eileen Collins, which comes with scikit-image.

The detector's file is not ours to ship: CONVLORA_TEST_YUNET names it, and without it only the errors are tested.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from convlora.errors import ConvloraError, FileError
from convlora.integrations import eg3d
from convlora.integrations.eg3d.prepare import FACE, YuNet, fit_pose

pytest.importorskip("cv2")
# MTCNN's, of another implementation, in pixels.
POINTS = np.array([[205.01, 101.73], [246.76, 103.71], [224.67, 128.96], [201.72, 139.25], [245.27, 141.86]])


@pytest.fixture(scope="module")
def detector() -> YuNet:
    path = os.environ.get("CONVLORA_TEST_YUNET")
    if not path:
        pytest.skip("CONVLORA_TEST_YUNET names no detector")
    return YuNet(path)


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return pytest.importorskip("skimage.data").astronaut()


def test_the_landmarks_are_near_another_detectors(detector, astronaut, capfd):
    (face,) = detector.detect(astronaut, "a")
    assert np.abs(face.landmarks - POINTS).max() < 6 and face.score > 0.9
    x, y, width, height = face.box
    assert (face.landmarks > [x, y]).all() and (face.landmarks < [x + width, y + height]).all()
    fit = fit_pose(face.landmarks, FACE)
    assert abs(fit.angles.yaw) < 8 and abs(fit.angles.roll) < 6 and abs(fit.angles.pitch) < 12
    assert capfd.readouterr() == ("", "")  # OpenCV's announcements


@pytest.mark.parametrize("degrees", [-40, -20, 20, 40])
def test_landmarks_turn_with_the_photo(detector, astronaut, degrees):
    (face,) = detector.detect(astronaut, "a")
    middle = np.array([224.0, 120.0])
    turned = Image.fromarray(astronaut).rotate(degrees, Image.Resampling.BICUBIC, center=(224.5, 120.5))
    (other,) = detector.detect(np.array(turned), "a")
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    back = (other.landmarks - middle) @ np.array([[c, s], [-s, c]]) + middle
    assert np.abs(back - face.landmarks).max() < 3.5  # the eyes are 42 pixels apart; 33 without looking again


@pytest.mark.parametrize("factor", [0.5, 4])
def test_landmarks_scale_with_the_photo(detector, astronaut, factor):
    (face,) = detector.detect(astronaut, "a")
    side = round(512 * factor)
    (other,) = detector.detect(np.array(Image.fromarray(astronaut).resize((side, side), Image.Resampling.LANCZOS)), "a")
    assert np.abs((other.landmarks + 0.5) / factor - 0.5 - face.landmarks).max() < 3.5


def test_a_face_that_fills_its_photo_and_one_that_is_small_in_it_are_found(detector, astronaut):
    close = np.array(Image.fromarray(astronaut[40:210, 140:310]).resize((1700, 1700)))
    assert len(detector.detect(close, "close")) == 1
    far = np.pad(astronaut, ((900, 500), (1500, 400), (0, 0)), mode="edge")
    (face,) = detector.detect(far, "far")
    assert np.abs(face.landmarks - [1500, 900] - POINTS).max() < 6
    assert detector.detect(astronaut[300:], "none") == []


def test_from_photos_to_an_album(detector, astronaut, tmp_path):
    folder, picture = tmp_path / "photos", Image.fromarray(astronaut)
    folder.mkdir()
    picture.save(folder / "a_plain.jpg", quality=95)
    picture.filter(ImageFilter.GaussianBlur(2)).save(folder / "b_blurred.png")
    picture.resize((256, 256)).save(folder / "c_small.png")
    picture.crop((205, 0, 512, 512)).save(folder / "d_cropped.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.crop((60, 0, 420, 512)).rotate(90, expand=True).save(folder / "e_sideways.jpg", exif=exif, quality=95)
    ImageOps.mirror(picture).convert("L").save(folder / "f_grey_mirrored.png")
    two = Image.new("RGB", (1024, 512))
    two.paste(picture, (0, 0))
    two.paste(ImageOps.mirror(picture), (512, 0))
    two.save(folder / "g_two.png")
    hidden = astronaut.copy()
    hidden[88:160, 170:285] = 0  # a bar from the brows to the chin
    Image.fromarray(hidden).save(folder / "h_bar.png")
    done = eg3d.prepare(folder, tmp_path / "album", detector=detector, progress=False)
    assert done.train == ["0000_a_plain.png", "0004_e_sideways.png", "0005_f_grey_mirrored.png"]
    reasons = dict(done.rejected)
    assert "blurred: sharpness" in reasons["b_blurred.png"] and "face is small" in reasons["c_small.png"]
    assert "outside the photo" in reasons["d_cropped.png"] and "--identity" in reasons["g_two.png"]
    assert "h_bar.png" in reasons
    album = eg3d.load_album(tmp_path / "album", 512)
    assert album.train.images.shape == (3, 3, 512, 512)
    same, turned = album.train.images[0], album.train.images[1]
    assert (same - turned).abs().mean() < 0.1  # the same photo, stored on its side
    with Image.open(tmp_path / "album" / "contact_sheet.png") as sheet:
        assert sheet.height > 400


def test_a_file_that_is_no_detector_is_named(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no network")
    with pytest.raises(FileError, match="x.onnx is no face detector that OpenCV can read"):
        YuNet(tmp_path / "x.onnx")
    with pytest.raises(FileError, match="no such file"):
        YuNet(tmp_path / "gone.onnx")


def test_without_opencv_the_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConvloraError, match=r'pip install "convlora\[faces\]"; or give landmarks'):
        YuNet("x.onnx")
