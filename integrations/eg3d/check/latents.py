"""Latents of another generator: the wrong number of ws, or the wrong width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.check.finding import Finding
from convlora.integrations.eg3d.generator import TriPlaneGenerator

SUFFIXES = (".npy", ".safetensors")


def check_latents(G: TriPlaneGenerator, files: Sequence[Path], names: Sequence[str]) -> list[Finding]:
    """Whether latents (`.npy` as PTI and My3DGen write them, or anchors) fit G and the photos called `names`."""
    return [_check(G, path, names) for path in files]


def latent_files(folder: Path) -> list[Path]:
    """The latents that lie in an album's folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _check(G: TriPlaneGenerator, path: Path, names: Sequence[str]) -> Finding:
    what = f"latents {path.name}"
    try:
        if path.suffix == ".npy":
            shape = tuple(np.load(path, mmap_mode="r", allow_pickle=False).shape)
        else:
            anchors = Anchors.load(path)
            shape = tuple(anchors.w.shape)
            missing = [name for name in anchors.names if name not in names]
            if missing:
                seen = f"of {missing[0]}, which is not in the album"
                return Finding(what, "error", seen, "invert the photos of this album")
    except (OSError, ValueError, ConvloraError, EOFError) as error:
        if isinstance(error, FileError) and "no anchors" in str(error):
            return Finding(what, "not tested", "a safetensors file that holds no anchors")
        return Finding(what, "error", f"not readable: {error}", "write it again with numpy.save, without pickling")
    width = shape[-1] if shape else 0
    if width != G.w_dim:
        return Finding(
            what, "error", f"shape {shape}: w of {width} numbers, this generator's has {G.w_dim}",
            "invert the photos with this generator: latents of another mean nothing to it",
        )  # fmt: skip
    count = shape[-2] if len(shape) > 2 else 1
    if count not in (1, G.num_ws):
        pixels = 2 ** ((count + 2) // 2)
        resolution = f" ({count} are those of a StyleGAN2 of {pixels} pixels)" if count % 2 == 0 else ""
        return Finding(
            what, "error", f"shape {shape}: {count} latents, this generator takes {G.num_ws}{resolution}",
            "PTI's code writes 18 whatever the generator is: keep one (W), or invert again",
        )  # fmt: skip
    return Finding(what, "ok", f"shape {shape}, {G.num_ws} × {G.w_dim} wanted")
