"""Photos in, pictures out: what is read is what is there, and damaged or unsuitable files are named."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convlora.errors import AlbumError, ConvloraError, FileError
from convlora.integrations.eg3d import images

PIL = pytest.importorskip("PIL")
from PIL import Image, ImageSequence  # noqa: E402


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def exact(*shape: int) -> Tensor:
    """Random images whose values are exactly representable in eight bits."""
    return images.to_uint8(noise(*shape)).float() / 127.5 - 1


def test_png_round_trip_is_exact(tmp_path: Path) -> None:
    image = exact(3, 5, 7)
    path = images.save_png(tmp_path / "new" / "a.png", image)
    assert torch.equal(images.load_rgb(path), image)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]  # nothing temporary is left


def test_to_uint8_rounds_clamps_and_draws_nan_black() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, float("nan"), float("inf"), float("-inf"), 2 / 255 * 1.4 - 1])
    assert images.to_uint8(values).tolist() == [0, 0, 128, 255, 255, 0, 255, 0, 1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_are_refused_by_name(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(AlbumError, match=rf"photo\.\w+ has mode {mode}, .*convert\(\"RGB\"\)"):
        images.load_rgb(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"photo.{suffix}"
    images.to_pil(noise(3, 64, 64)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(AlbumError, match=rf"photo\.{suffix} is not a readable picture"):
        images.load_rgb(path)


def test_missing_files_and_non_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    for name in ("notes.png", "absent.png"):
        with pytest.raises(AlbumError, match=name):
            images.load_rgb(tmp_path / name)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image, exif = exact(3, 4, 6), Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90° clockwise to view
    images.to_pil(image).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(images.load_rgb(tmp_path / "a.png"), image.rot90(-1, (1, 2)))


def test_grid_places_rows_first_and_fills_with_white() -> None:
    batch = noise(5, 3, 2, 4)
    tiled = images.grid(batch, 3)
    assert tiled.shape == (3, 4, 12)
    for i, image in enumerate(batch):
        row, column = divmod(i, 3)
        assert torch.equal(tiled[:, row * 2 : row * 2 + 2, column * 4 : column * 4 + 4], image)
    assert (tiled[:, 2:, 8:] == 1).all()


def test_sheet_holds_captions_and_unscaled_pixels() -> None:
    rows = [("truth", exact(2, 3, 20, 20)), ("a model with a long name", exact(3, 3, 30, 10))]
    drawn = torch.tensor(list(images.sheet(rows, scale=2).tobytes()), dtype=torch.uint8)
    page = images.sheet(rows, scale=2)
    drawn = drawn.view(page.height, page.width, 3).permute(2, 0, 1)
    margin = page.width - 2 * 2 * 20
    assert (drawn[:, :40, :margin] < 128).any()  # the caption's ink
    expected = images.to_uint8(images.grid(rows[0][1], 2)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(drawn[:, :40, margin:], expected)


def test_data_uris_decode_to_the_image() -> None:
    image = exact(3, 16, 16)
    head, data = images.data_uri(image, "png").split(",")
    assert head == "data:image/png;base64"
    pixels = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(data))).tobytes())).view(16, 16, 3)
    assert torch.equal(pixels.permute(2, 0, 1).to(torch.uint8), images.to_uint8(image))
    head, data = images.data_uri(image, quality=50).split(",")
    assert head == "data:image/webp;base64" and base64.b64decode(data)[8:12] == b"WEBP"
    assert len(images.data_uri(image, quality=10)) < len(images.data_uri(image, quality=95))


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_keep_frames_time_and_loop(tmp_path: Path, suffix: str) -> None:
    frames = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    with Image.open(images.save_animation(tmp_path / f"turn.{suffix}", frames, seconds=1.0)) as file:
        assert file.info["loop"] == 0
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(file) if frame.load()]
    assert durations == [200] * 5


def test_bad_requests_say_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConvloraError, match=r"\(3, H, W\), not \(1, 4, 4\)"):
        images.to_pil(noise(1, 4, 4))
    with pytest.raises(ConvloraError, match=r"grid needs images of shape"):
        images.grid(torch.empty(0, 3, 4, 4), 2)
    with pytest.raises(ConvloraError, match="at least one column"):
        images.grid(noise(1, 3, 4, 4), 0)
    with pytest.raises(ConvloraError, match="at least one row"):
        images.sheet([])
    with pytest.raises(ConvloraError, match=r"\.gif, \.webp or \.mp4, not 'a\.avi'"):
        images.save_animation(tmp_path / "a.avi", noise(2, 3, 4, 4))
    with pytest.raises(ConvloraError, match="positive length"):
        images.save_animation(tmp_path / "a.gif", noise(2, 3, 4, 4), seconds=0)
    with pytest.raises(FileError, match="is a folder"):
        images.save_png(tmp_path, noise(3, 4, 4))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = images.write_bytes(tmp_path / "a.bin", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        images.write_bytes(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"old")]


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConvloraError, match=r'pip install "convlora\[eg3d\]"'):
        images.to_pil(noise(3, 4, 4))


def test_a_film_has_the_frames_and_the_length_asked_for(tmp_path):
    av = pytest.importorskip("av")
    ramp = torch.linspace(-1, 1, 12).view(12, 1, 1, 1).expand(12, 3, 33, 48)  # 33: odd, one row is lost
    path = images.save_animation(tmp_path / "a.mp4", ramp, seconds=0.5)
    with av.open(str(path)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert float(film.streams.video[0].average_rate) == pytest.approx(24)
    assert len(frames) == 12 and frames[0].shape == (32, 48, 3)
    assert [int(frame.mean()) for frame in frames] == pytest.approx(((ramp[:, 0, 0, 0] + 1) * 127.5).tolist(), abs=6)


def test_sheets_are_png_or_webp_by_their_name(tmp_path: Path) -> None:
    rows = [("noise", noise(2, 3, 32, 32)), ("more", noise(1, 3, 32, 32))]
    for name, format in (("a.png", "PNG"), ("a.webp", "WEBP")):
        with Image.open(images.save_sheet(tmp_path / name, rows)) as found:
            assert found.format == format and found.size == images.sheet(rows).size
