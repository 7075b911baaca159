"""Adapter files: one safetensors file with text metadata. Read fully and checked before anything is touched."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from convlora._version import __version__
from convlora.errors import ConvloraError, FileError
from convlora.record import Record

FORMAT_VERSION = "1"
_FIELDS = ("format", "format_version", "method", "options", "ranks", "trained", "buffers", "base_fingerprint")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path beside `path`, which is then fsynced and renamed.

    A reader never sees half a file; if the block raises, nothing changes. Missing folders are made.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; give a file name, such as {path / 'adapter.safetensors'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp's 0600 would surprise whoever shares the folder; give it what open() would have given
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors and text metadata as one safetensors file, atomically."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, dict(metadata))
    return Path(path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file; `FileError` if it is missing, truncated or no such file."""
    path = Path(path)
    if not path.is_file():
        raise FileError(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read as safetensors ({error}); it may be truncated: copy or download it again"
        ) from None


def metadata_of(record: Record, extra: Mapping[str, str]) -> dict[str, str]:
    taken = sorted(set(extra) & {*_FIELDS, "strengths", "library_version", "created"})
    if taken:
        raise FileError(f"metadata fields {taken} are written by convlora itself; choose other names")
    return {
        "format": "convlora",
        "format_version": FORMAT_VERSION,
        "method": record.method,
        "options": json.dumps(record.options),
        "ranks": json.dumps(record.ranks),
        "trained": json.dumps(record.trained),
        "buffers": json.dumps(record.buffers),
        "base_fingerprint": record.base_fingerprint,
        **({"strengths": json.dumps(record.strengths)} if record.strengths else {}),
        "library_version": __version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **{key: str(value) for key, value in extra.items()},
    }


def record_of(path: Path, metadata: Mapping[str, str], name: str = "default") -> Record:
    """The record that a file's metadata describes, checked, under the adapter's name on the model."""
    if metadata.get("format") != "convlora":
        raise FileError(f"{path} is no convlora adapter (metadata format={metadata.get('format')!r})")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise FileError(
            f"{path} has format version {metadata.get('format_version')!r}, this convlora {__version__} reads "
            f"{FORMAT_VERSION!r}: pip install --upgrade convlora"
        )
    try:
        ranks = {layer: (int(nominal), int(inner)) for layer, (nominal, inner) in json.loads(metadata["ranks"]).items()}
        trained = list(json.loads(metadata["trained"]))
        strengths = {name: float(value) for name, value in json.loads(metadata.get("strengths", "{}")).items()}
        if foreign := sorted(set(strengths) - {*ranks, *trained}):
            raise ValueError(f"strengths for {foreign}, which the file does not hold")
        return Record(
            name,
            metadata["method"],
            ranks,
            dict(json.loads(metadata["options"])),
            trained,
            list(json.loads(metadata["buffers"])),
            metadata["base_fingerprint"],
            strengths,
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: damaged adapter metadata ({type(error).__name__}: {error})") from None


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast to a file's dtype; integers, and scalars such as LoRA's scale, keep theirs."""
    if dtype is None or not tensor.is_floating_point() or tensor.ndim == 0:
        return tensor
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConvloraError(f"dtype must be float32, float16, bfloat16 or float64, not {dtype}")
    return tensor.to(dtype)
