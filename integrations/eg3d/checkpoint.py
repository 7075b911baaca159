"""EG3D generators on disk, and the small one that ships with the library under the name "lab"."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from convlora.errors import FileError
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.stylegan2.checkpoint import build, load_tensors, read_checkpoint, write_checkpoint

LAB = Path(__file__).parent / "lab" / "data" / "prior.safetensors"


def load_generator(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> TriPlaneGenerator:
    """Generator in eval mode from "lab", a .safetensors file with config in its metadata or beside it, or a folder."""
    if str(path) == "lab":
        path = LAB
        if not LAB.is_file():
            raise FileError(f"the lab generator's weights are not installed ({LAB}); reinstall convlora[lab]")
    config, tensors = read_checkpoint(path)
    generator = build(TriPlaneGenerator, config, str(path))
    load_tensors(generator, tensors, str(path))
    return generator.eval().to(device)


def save_generator(
    generator: TriPlaneGenerator,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a generator so that load_generator(path) gives it back, current rendering options included. Atomic."""
    return write_checkpoint(generator, path, generator.config, metadata, dtype)
