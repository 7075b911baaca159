"""EG3D generators on disk, and the small ones that ship with the library, "lab" and "lab-cats"."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convlora.errors import FileError
from convlora.integrations.eg3d.configs import CONFIGS
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.stylegan2.checkpoint import DERIVED, UNUSED, build, chosen, write_checkpoint
from convlora.integrations.stylegan2.sources import Source, read_source

_NEEDED = ("ray_start", "ray_end", "box_warp", "depth_resolution")  # of rendering_kwargs; the rest has defaults
LAB = Path(__file__).parent / "lab" / "data" / "prior.safetensors"
SHIPPED = {"lab": LAB, "lab-cats": LAB.with_name("prior_cats.safetensors")}


def load_generator(
    source: str | os.PathLike[str], device: str | torch.device = "cpu", preset: str | None = None
) -> TriPlaneGenerator:
    """Generator in eval mode, from "lab", "lab-cats" or whatever `read_source` reads. Nothing in the file is executed.

    Args:
        source: "lab", "lab-cats"; a .safetensors file with its configuration in its metadata or in config.json beside
            it; a folder with one; an official .pkl; a .pt/.pth state dict; an https:// or hf:// address; a Hub id
            `user/name`.
        preset: a name in `CONFIGS`, for files without a configuration whose shapes fit several.

    Raises:
        FileError: missing, damaged, refused, of another family; names or shapes that do not fit.
        HubError: it cannot be fetched.
    """
    if str(source) in SHIPPED:
        source = SHIPPED[str(source)]
        if not source.is_file():
            raise FileError(f"the lab generator's weights are not installed ({source}); reinstall convlora[lab]")
    return generator_of(read_source(source), preset).to(device)


def generator_of(found: Source, preset: str | None = None) -> TriPlaneGenerator:
    """The generator that was found, in eval mode on the CPU."""
    source = str(found.path)
    if found.config is not None:
        if preset is not None:
            raise FileError(f"{source} carries its own configuration, which a preset must not replace")
        if "rendering_kwargs" not in found.config:
            what = f"a {found.class_name}" if found.class_name else "another generator, or one"
            raise FileError(f"{source} holds {what} without rendering_kwargs, not EG3D: try stylegan2.load_generator")
        config = found.config
    else:
        config = chosen(preset, CONFIGS) or fitting_preset(found.tensors, source)
    rendering = config["rendering_kwargs"]
    if not isinstance(rendering, Mapping):
        raise FileError(f"{source}: rendering_kwargs is a {type(rendering).__name__}, not a dictionary")
    if lacking := [name for name in _NEEDED if name not in rendering]:
        raise FileError(f"{source}: rendering_kwargs lacks {', '.join(lacking)}")
    side = config.get("neural_rendering_resolution", 64)
    if type(side) is not int or not 1 <= side <= 4096:
        raise FileError(f"{source} has neural_rendering_resolution {side!r}; it is a number of pixels")
    generator: TriPlaneGenerator = build(TriPlaneGenerator, config, found.tensors, found.path)
    return generator


def fitting_preset(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The one of `CONFIGS` whose generator has tensors of these names and shapes.

    Raises:
        FileError: none has, or several have; they then differ in how they render, which no tensor tells.
    """
    shapes = {key: tuple(value.shape) for key, value in tensors.items() if _counts(key)}
    fitting = [name for name in CONFIGS if _shapes_of(name) == shapes]
    if not fitting:
        raise FileError(
            f"{source} has no configuration, and its tensors fit none of {', '.join(CONFIGS)}: put its constructor "
            "arguments into a config.json beside it"
        )
    if len(fitting) > 1:
        raise FileError(
            f"{source} has no configuration, and its tensors fit {', '.join(fitting)} alike: say which with preset= "
            f"(on the command line --preset {fitting[-1]})"
        )
    return CONFIGS[fitting[0]]


def _shapes_of(preset: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = TriPlaneGenerator(**CONFIGS[preset]).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if _counts(key)}


def _counts(key: str) -> bool:
    return not key.endswith(DERIVED) and key not in UNUSED


def save_generator(
    generator: TriPlaneGenerator,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a generator so that load_generator(path) gives it back, current rendering options included. Atomic."""
    return write_checkpoint(generator, path, generator.config, metadata, dtype)
