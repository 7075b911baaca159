"""Generators on disk: written as one safetensors file with their constructor arguments, read from any known form."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convlora import files
from convlora.errors import ConvloraError, FileError
from convlora.integrations.stylegan2.configs import CONFIGS
from convlora.integrations.stylegan2.foreign import infer_config
from convlora.integrations.stylegan2.generator import Generator
from convlora.integrations.stylegan2.sources import Source, read_source

# buffers a checkpoint may lack, because the constructor computes them, or carry without use here
DERIVED = "resample_filter"
UNUSED = frozenset({"dataset_label_std"})
_LARGEST = 1 << 20  # of the numbers in a configuration


def read_checkpoint(source: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of anything `read_source` reads; StyleGAN2's arguments are inferred where the file has none.

    Raises:
        FileError: what is missing or broken; EG3D's tensors without a configuration.
    """
    found = read_source(source)
    return config_of(found), found.tensors


def config_of(found: Source, preset: str | None = None) -> dict[str, Any]:
    """Arguments of `Generator` for what was found: its own, else the preset's, else those its tensors tell."""
    if found.config is None and any(key.startswith("backbone.") for key in found.tensors):
        raise FileError(
            f"{found.path} holds EG3D's tensors without a configuration: load it with eg3d.load_generator and preset=, "
            f"or once with `convlora eg3d import {found.path.name} OUT --preset NAME`"
        )
    if found.config is None:
        return chosen(preset, CONFIGS) or infer_config(found.tensors, str(found.path))
    if preset is not None:
        raise FileError(f"{found.path} carries its own configuration, which a preset must not replace")
    return found.config


def chosen(preset: str | None, presets: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The preset of this name, None for None."""
    if preset is not None and preset not in presets:
        raise ConvloraError(f"no preset {preset!r}; there are {', '.join(presets)}")
    return None if preset is None else presets[preset]


def build(factory: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: Path) -> Any:
    """`factory(**config)` in eval mode, with these tensors after checking every name and shape; errors name the file.

    Arguments in a stranger's pickle may ask for more memory than there is, so they are tried on the meta device
    first, which has shapes only. For safetensors the second that this takes is saved.
    """
    _check_numbers(config, len(tensors), source)
    if source.suffix != ".safetensors":
        with torch.device("meta"):
            _check_fit(_made(factory, config, source).state_dict(), tensors, source)
    model = _made(factory, config, source)
    own = model.state_dict()
    _check_fit(own, tensors, source)
    model.load_state_dict({key: value for key, value in tensors.items() if key in own}, strict=False)
    return model.eval()


def _check_numbers(config: Mapping[str, Any], tensors: int, source: Path) -> None:
    """No number so large that counting to it would take for ever."""
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
            layers = value.get("num_layers", 0)
            if isinstance(layers, int) and layers > tensors:
                raise FileError(f"the configuration of {source} asks for {layers:,} layers; the file has fewer tensors")
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, int) and abs(value) > _LARGEST:
            raise FileError(f"the configuration of {source} asks for {value:,} of something, which no generator has")


def _check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    missing = [key for key in own if key not in tensors and not key.endswith(DERIVED)]
    unexpected = [key for key in tensors if key not in own and key not in UNUSED]
    wrong = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if missing or unexpected:
        raise FileError(
            f"{source} does not fit this generator: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    if wrong:
        key = wrong[0]
        raise FileError(
            f"{source} does not fit this generator: {key} has shape {tuple(tensors[key].shape)}, "
            f"the generator needs {tuple(own[key].shape)} ({len(wrong)} such tensors)"
        )


def _made(factory: Any, config: Mapping[str, Any], source: Path) -> Any:
    try:
        return factory(**config)
    # whatever the constructors make of arguments of other types: they are the file's, not the caller's
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RuntimeError, ConvloraError) as error:
        raise FileError(f"the configuration of {source} does not describe a {factory.__name__}: {error}") from error


def write_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write state and config as one safetensors file, atomically; `dtype` is that of the floating-point tensors."""
    tensors = {key: files.cast(value, dtype).clone() for key, value in model.state_dict().items()}
    return files.write(Path(path), tensors, {**(metadata or {}), "config": json.dumps(config)})


def load_generator(
    source: str | os.PathLike[str], device: str | torch.device = "cpu", preset: str | None = None
) -> Generator:
    """StyleGAN2 generator in eval mode, from whatever `read_source` reads. Nothing in the file is executed.

    Args:
        source: a .safetensors file (configuration in its metadata, in config.json beside it, or inferred from its
            shapes), a folder with one, an official .pkl, a .pt/.pth state dict (rosinality's too), an https:// or
            hf:// address, or a Hub id `user/name`.
        preset: a name in `CONFIGS`, for files without a configuration.

    Raises:
        FileError: missing, damaged, refused, of another family; names or shapes that do not fit.
        HubError: it cannot be fetched.
    """
    return generator_of(read_source(source), preset).to(device)


def generator_of(found: Source, preset: str | None = None) -> Generator:
    """The generator that was found, in eval mode on the CPU."""
    if found.class_name == "TriPlaneGenerator" or "rendering_kwargs" in (found.config or {}):
        raise FileError(f"{found.path} holds an EG3D generator: load it with eg3d.load_generator")
    generator: Generator = build(Generator, config_of(found, preset), found.tensors, found.path)
    return generator


def save_generator(
    generator: Generator,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a StyleGAN2 generator so that load_generator(path) gives it back. Atomic."""
    return write_checkpoint(generator, path, generator.config, metadata, dtype)
