"""Photos as people have them: any format and orientation, as upright RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convlora.errors import AlbumError, ConvloraError
from convlora.integrations.eg3d.prepare.landmarks import RGB

if TYPE_CHECKING:
    from PIL import Image

_HEIF = (".heic", ".heif")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", *_HEIF)
MAX_PIXELS = 120_000_000  # 360 MB once decoded


def list_photos(source: str | Path) -> list[Path]:
    """The photo at a path, or those in a folder in name order; subfolders are not searched.

    Raises `AlbumError`: no such path, or no photos there.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise AlbumError(f"no folder of photos at {source}")
    inside = sorted(source.iterdir())
    found = [path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file() and path.name[0] != "."]
    if not found:
        folders = sum(path.is_dir() for path in inside)
        hint = f"; it has {folders} subfolders, which are not searched" if folders else ""
        raise AlbumError(f"{source} holds no photos ({', '.join(SUFFIXES)}){hint}")
    return found


def read_photo(path: str | Path) -> RGB:
    """(H, W, 3) uint8, turned upright if its EXIF says so.

    Grey, palette, CMYK and 16-bit pictures are converted; of an animation the first picture is taken.

    Raises `AlbumError`: not readable, more than MAX_PIXELS, transparent (what is behind is not known), or
    floating-point values of unknown range.
    """
    path = Path(path)
    _prepare_pillow(path)
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is our limit
            with Image.open(path) as file:
                width, height = file.size
                if width * height > MAX_PIXELS:
                    raise AlbumError(
                        f"{path.name} has {width} × {height} pixels, over the {MAX_PIXELS:,} that are read: reduce it"
                    )
                return np.ascontiguousarray(_rgb(ImageOps.exif_transpose(file), path.name))
    # Pillow's own promise is OSError; damaged files also reach the others
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise AlbumError(f"{path.name} is not a readable picture ({error})") from None


def _rgb(picture: Image.Image, name: str) -> RGB:
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        lowest = picture.getchannel("A").getextrema()[0]
        if lowest != 255:
            raise AlbumError(f"{name} is transparent in places: put it on a background and save it without alpha")
    if picture.mode.startswith("I"):  # 16 bits, in one of Pillow's modes for it
        grey = np.asarray(picture).astype(np.float64)
        if grey.min() < 0 or grey.max() > 65535:
            raise AlbumError(f"{name} has values from {grey.min():g} to {grey.max():g}; up to 65535 are understood")
        return np.repeat((grey / 257).round().astype(np.uint8)[..., None], 3, 2)
    if picture.mode == "F":
        raise AlbumError(f"{name} has floating-point values, whose range is not known: save it with 8 bits")
    return np.array(picture.convert("RGB"))


def _prepare_pillow(path: Path) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConvloraError('photos need Pillow: pip install "convlora[eg3d]"') from None
    if path.suffix.lower() in _HEIF:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise AlbumError(f"{path.name}: HEIC photos need a plug-in of Pillow: pip install pillow-heif") from None
        register_heif_opener()
