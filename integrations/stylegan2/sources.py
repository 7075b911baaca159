"""Where weights come from, and in which form: one function that reads any of them into a configuration and tensors."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convlora import files, hub
from convlora.errors import FileError, HubError
from convlora.integrations import weights
from convlora.integrations.stylegan2.foreign import from_rosinality, is_rosinality
from convlora.integrations.stylegan2.official_pickle import Network, read_pickle
from convlora.model_card import is_hub_id

TORCH = (".pt", ".pth")
_STATES = ("g_ema", "G_ema", "ema", "state_dict", "g", "G", "generator")  # where a checkpoint keeps its generator
NVIDIA = "NVIDIA Source Code License (non-commercial) if these are NVIDIA's weights: see their source"
UNKNOWN = "not stated in the file: see its source"


class Source(NamedTuple):
    """Weights as they were found."""

    path: Path
    config: dict[str, Any] | None  # arguments of the generator's constructor; None where the file does not say
    tensors: dict[str, Tensor]
    class_name: str  # as the file has it, else ""
    licence: str
    metadata: dict[str, str]  # of a safetensors file


def read_source(source: str | os.PathLike[str]) -> Source:
    """Read weights, from a path, a folder, an address or the Hub, without executing anything of them.

    Args:
        source: a path of a .safetensors, .pkl (official pickle) or .pt/.pth (torch.save) file; a folder with one
            .safetensors; `https://…[#sha256=…]`; `hf://user/repository[@revision]/file`; or a bare Hub id
            `user/name`, whose model.safetensors and config.json are taken. What exists as a path is a path.

    Raises:
        FileError: the file is missing, damaged, of another kind, or names something that is not allowed.
        HubError: it cannot be fetched.
    """
    address = f"hf://{source}/model.safetensors" if is_hub_id(source) else str(source)  # type: ignore[arg-type]
    path = _find(address)
    if path.suffix == ".pkl":
        network = read_pickle(path)
        return Source(path, _config_of(network), network.tensors, network.class_name, NVIDIA, {})
    if path.suffix in TORCH:
        return Source(path, None, _read_torch(path), "", UNKNOWN, {})
    tensors, metadata = files.read(path)
    config = _config_of_file(path, metadata, address)
    return Source(path, config, tensors, metadata.get("class_name", ""), metadata.get("license", UNKNOWN), metadata)


def _find(address: str) -> Path:
    if "://" in address:
        return weights.locate(address)
    file = Path(address)
    if not file.is_dir():
        return file
    found = sorted(file.glob("*.safetensors"))
    if len(found) != 1:
        raise FileError(f"{file} must hold exactly one .safetensors file, found {len(found)}; name the file instead")
    return found[0]


def _config_of_file(path: Path, metadata: Mapping[str, str], address: str) -> dict[str, Any] | None:
    """The configuration in a file's metadata, else in config.json beside it, here or in the same repository."""
    beside = path.with_name("config.json")
    match = weights.HUB_FILE.fullmatch(address)
    if match and "config" not in metadata and not beside.is_file():
        name = match["file"].rpartition("/")[0] + "/config.json"
        with contextlib.suppress(HubError):  # it lands in the same folder of the cache
            hub.pull(match["repo"], name.lstrip("/"), revision=match["revision"])
    if "config" in metadata:
        text = metadata["config"]
    elif beside.is_file():
        text = beside.read_text(encoding="utf-8")
    else:
        return None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"the configuration of {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileError(f"the configuration of {path} must be a JSON object, got {type(config).__name__}")
    return config


# ---- official pickles ----------------------------------------------------------------------------------------------


def _config_of(network: Network) -> dict[str, Any]:
    """Constructor arguments; what the saved object says of itself wins, since training changes it."""
    config = dict(network.arguments)
    for name in ("rendering_kwargs", "neural_rendering_resolution"):
        if name in network.attributes:
            config[name] = network.attributes[name]
    module = network.classes.get("superresolution")
    if module and isinstance(config.get("rendering_kwargs"), dict):
        config["rendering_kwargs"]["superresolution_module"] = module
    return config


# ---- torch.save ----------------------------------------------------------------------------------------------------


def _read_torch(path: Path) -> dict[str, Tensor]:
    held = _load_torch(path)
    state = next((held[key] for key in _STATES if isinstance(held.get(key), Mapping)), held)
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise FileError(
            f"{path} holds no tensors by name, nor under {', '.join(_STATES)}; it has {', '.join(map(str, held))[:200]}"
        )
    if all(key.startswith("module.") for key in tensors):  # of a network inside DataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if is_rosinality(tensors):
        average = held.get("latent_avg")
        return from_rosinality(tensors, average if isinstance(average, Tensor) else None, str(path))
    return {key: value.clone() for key, value in tensors.items()}  # off the mapped file


def _load_torch(path: Path) -> dict[str, Any]:
    """What torch.save wrote, by torch's own restricted reader."""
    if not path.is_file():
        raise FileError(f"no such file: {path}")
    with open(path, "rb") as file:
        start = file.read(16)
    zipped = start.startswith(b"PK\x03\x04")
    if not zipped and start[:1] != b"\x80":
        what = "is empty" if not start else "is a web page" if start.lstrip()[:1] == b"<" else "is something else"
        what = "is a Git LFS pointer: run `git lfs pull` where it came from" if start[:8] == b"version " else what
        raise FileError(f"{path} is no file of torch.save: it {what}")
    # rosinality's own snapshots carry their command line, which is a bare record of values
    allow = getattr(torch.serialization, "safe_globals", None)
    with allow([argparse.Namespace]) if allow else contextlib.nullcontext():
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise FileError(
                f"{path} holds more than tensors in containers ({named[1] if named else 'whole objects'}) and is not "
                "opened, because that could run code: ask for its state_dict, or save that in a sandbox"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
            raise FileError(f"{path} cannot be read as torch.save's: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(held, Mapping):
        raise FileError(f"{path} holds a {type(held).__name__}, not a dictionary of tensors")
    return dict(held)
