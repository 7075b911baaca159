"""Generators on disk: one safetensors file, its constructor arguments in the metadata or beside it in config.json."""

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
from convlora.integrations.stylegan2.generator import Generator

# buffers a checkpoint may lack, because the constructor computes them, or carry without use here
DERIVED = "resample_filter"
UNUSED = frozenset({"dataset_label_std"})


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a .safetensors file, or of a folder with one. FileError names what is missing or broken."""
    file = Path(path)
    if file.is_dir():
        found = sorted(file.glob("*.safetensors"))
        if len(found) != 1:
            raise FileError(
                f"{file} must hold exactly one .safetensors file, found {len(found)}; name the file instead"
            )
        file = found[0]
    if file.suffix == ".pkl":
        raise FileError(
            f"{file} is a pickle, which can run code when opened; loading it is not supported. "
            "Give a .safetensors file with its configuration"
        )
    tensors, metadata = files.read(file)
    beside = file.with_name("config.json")
    if "config" not in metadata and not beside.is_file():
        raise FileError(
            f"{file} has no 'config' in its metadata and no config.json beside it: its generator is unknown"
        )
    text = metadata["config"] if "config" in metadata else beside.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"the configuration of {file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileError(f"the configuration of {file} must be a JSON object, got {type(config).__name__}")
    return config, tensors


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into model by name, after checking every name and shape; the model is untouched if one is wrong."""
    own = model.state_dict()
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
    model.load_state_dict({key: value for key, value in tensors.items() if key in own}, strict=False)


def build(factory: Any, config: Mapping[str, Any], source: str) -> Any:
    """factory(**config), with errors that name the file."""
    try:
        return factory(**config)
    except (TypeError, ConvloraError) as error:
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


def load_generator(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Generator:
    """StyleGAN2 generator from a .safetensors file with config, or a folder holding both; in eval mode."""
    config, tensors = read_checkpoint(path)
    generator = build(Generator, config, str(path))
    load_tensors(generator, tensors, str(path))
    return generator.eval().to(device)


def save_generator(
    generator: Generator,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a StyleGAN2 generator so that load_generator(path) gives it back. Atomic."""
    return write_checkpoint(generator, path, generator.config, metadata, dtype)
