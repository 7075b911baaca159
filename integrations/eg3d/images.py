"""Pictures in and out: photos from disk, and PNGs, sheets, animations and data URIs of what a generator draws."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from convlora.errors import AlbumError, ConvloraError
from convlora.files import replacing

if TYPE_CHECKING:
    from PIL import Image

Rows = Sequence[tuple[str, Tensor]]


def load_rgb(path: str | Path) -> Tensor:
    """Read an RGB photo as (3, H, W) float32 in [-1, 1], turned upright if its EXIF says so.

    Raises `AlbumError`: missing, unreadable or truncated file, or a mode other than RGB. Grey, palette and
    transparent pictures are refused rather than guessed at: what is behind the transparency is not known.
    """
    return torch.from_numpy(_pixels(path, "RGB", "photos must be RGB")).permute(2, 0, 1).float().div_(127.5).sub_(1)


def load_grey(path: str | Path) -> Tensor:
    """Read an 8-bit grey picture, such as a mask, as (1, H, W) float32 in [0, 1].

    Raises `AlbumError`: missing, unreadable or truncated file, or a mode other than L.
    """
    return torch.from_numpy(_pixels(path, "L", "masks must be 8-bit grey"))[None].float().div_(255)


def _pixels(path: str | Path, mode: str, rule: str) -> np.ndarray:
    """The upright pixels of a picture that must have this mode."""
    _pillow()
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            found = file.mode
            pixels = np.array(ImageOps.exif_transpose(file)) if found == mode else None
    # Pillow's own promise is OSError; damaged PNGs and TIFFs also reach the others
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise AlbumError(f"{path} is not a readable picture ({error}): replace it or take it out") from None
    if pixels is None:
        raise AlbumError(
            f"{path} has mode {found}, {rule}: convert it, for instance with "
            f'PIL.Image.open("{Path(path).name}").convert("{mode}").save(...)'
        )
    return pixels


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded and clamped, any shape, on the CPU. NaN is drawn black."""
    scaled = images.detach().float().cpu().add(1).mul(127.5).round()
    return torch.nan_to_num(scaled, nan=0.0).clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a Pillow picture."""
    _pillow()
    from PIL import Image

    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ConvloraError(f"a picture has shape (3, H, W), not {tuple(image.shape)}")
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy())


def grid(images: Tensor, columns: int) -> Tensor:
    """Tile images (N, 3, H, W), rows first, as one (3, rows · H, columns · W); missing cells are white."""
    _check_batch(images, "grid")
    if columns < 1:
        raise ConvloraError(f"a grid needs at least one column, got {columns}")
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    cells = images.new_ones(rows * columns, channels, height, width)
    cells[:n] = images
    tiled = cells.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return tiled.reshape(channels, rows * height, columns * width)


def sheet(rows: Rows, scale: int = 1) -> Image.Image:
    """A contact sheet: one line of pictures (N, 3, H, W) per (caption, images), captions to the left.

    Rows may differ in number and size. `scale` repeats every pixel, so that small renders stay sharp.
    """
    _pillow()
    from PIL import Image, ImageDraw, ImageFont

    if not rows or scale < 1:
        raise ConvloraError(f"a sheet needs at least one row and scale >= 1, got {len(rows)} rows, scale {scale}")
    for _, images in rows:
        _check_batch(images, "sheet")
    strips = [to_pil(grid(images, len(images)).detach()) for _, images in rows]
    strips = [strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST) for strip in strips]
    gap, font = 8, ImageFont.load_default()
    boxes = [ImageDraw.Draw(strips[0]).multiline_textbbox((0, 0), caption, font=font) for caption, _ in rows]
    margin = int(max(box[2] for box in boxes)) + 2 * gap
    heights = [max(strip.height, int(box[3]) + gap) for strip, box in zip(strips, boxes)]
    size = (margin + max(strip.width for strip in strips), sum(heights) + gap * (len(strips) - 1))
    page = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(page), 0
    for (caption, _), strip, box, height in zip(rows, strips, boxes, heights):
        draw.multiline_text((gap, top + (height - int(box[3])) // 2), caption, fill="black", font=font)
        page.paste(strip, (margin, top))
        top += height + gap
    return page


def save_png(path: str | Path, image: Tensor | Image.Image) -> Path:
    """Write (3, H, W) in [-1, 1], or a Pillow picture such as a `sheet`, atomically as PNG."""
    return write_bytes(path, _encode(to_pil(image) if isinstance(image, Tensor) else image, "png"))


def save_sheet(path: str | Path, rows: Rows, scale: int = 1) -> Path:
    """Write the `sheet` of rows as PNG, or, a tenth of its size, as .webp."""
    if Path(path).suffix.lower() == ".webp":
        return write_bytes(path, _encode(sheet(rows, scale), "webp", quality=88))
    return save_png(path, sheet(rows, scale))


def data_uri(image: Tensor, format: Literal["webp", "png"] = "webp", quality: int = 85) -> str:
    """(3, H, W) in [-1, 1] as `data:image/…;base64,…`; `quality` (0..100) is WebP's, PNG is exact."""
    data = _encode(to_pil(image), format, quality=quality)
    return f"data:image/{format};base64,{base64.b64encode(data).decode('ascii')}"


def save_animation(path: str | Path, frames: Tensor, seconds: float = 2.0) -> Path:
    """Write frames (F, 3, H, W) as an endless .gif or .webp whose round takes `seconds`, or as an .mp4 (H.264).

    GIF has 256 colours and keeps time in hundredths of a second, of which most viewers show two or more. An .mp4 needs
    even sides: an odd one loses its last row or column of pixels.
    """
    path = Path(path)
    _check_batch(frames, "save_animation")
    if path.suffix.lower() not in (".gif", ".webp", ".mp4"):
        raise ConvloraError(f"an animation is written as .gif, .webp or .mp4, not {path.name!r}")
    if not 0 < seconds < float("inf"):
        raise ConvloraError(f"seconds={seconds}: an animation needs a positive length")
    if path.suffix.lower() == ".mp4":
        return write_bytes(path, _mp4(frames, seconds))
    first, *rest = [to_pil(frame) for frame in frames]
    milliseconds = max(1, round(1000 * seconds / len(frames)))
    options = dict(save_all=True, append_images=rest, duration=milliseconds, loop=0)
    if path.suffix.lower() == ".webp":
        return write_bytes(path, _encode(first, "webp", quality=85, **options))
    options["duration"] = max(20, round(milliseconds, -1))
    return write_bytes(path, _encode(first, "gif", **options))


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write atomically; makes missing folders."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)


def _encode(picture: Image.Image, format: str, **options: object) -> bytes:
    if format not in ("png", "webp", "gif"):
        raise ConvloraError(f"pictures are written as png, webp or gif, not {format!r}")
    if format == "png":
        options = {}
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def _mp4(frames: Tensor, seconds: float) -> bytes:
    try:
        import av
    except ImportError:
        raise ConvloraError('films need PyAV: pip install "convlora[eg3d]"') from None
    if min(frames.shape[-2:]) < 2:
        raise ConvloraError(f"a film needs frames of at least 2 × 2 pixels, not {tuple(frames.shape[-2:])}")
    height, width = frames.shape[-2] // 2 * 2, frames.shape[-1] // 2 * 2
    pixels = to_uint8(frames[..., :height, :width]).permute(0, 2, 3, 1).contiguous().numpy()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as film:
        rate = Fraction(len(pixels) / seconds).limit_denominator(1000)
        stream = film.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for picture in pixels:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
    return buffer.getvalue()


def _check_batch(images: Tensor, what: str) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ConvloraError(f"{what} needs images of shape (N, 3, H, W), not {tuple(images.shape)}")


def _pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConvloraError('pictures need Pillow: pip install "convlora[eg3d]"') from None
