"""Adapter files: one safetensors file with text metadata. Read fully and checked before anything is touched."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from convlora._version import __version__
from convlora.errors import ConvloraError, FileError
from convlora.record import Record

FORMAT_VERSION = "1"
_FIELDS = ("format", "format_version", "method", "options", "ranks", "trained", "buffers", "base_fingerprint")
_OWN = {*_FIELDS, "strengths", "library_version", "created"}  # the rest is the user's


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
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        raise FileError(f"{path} is a folder; give a file, such as {path / (inside or ['adapter.safetensors'])[0]}")
    if not path.is_file():
        raise FileError(f"no such file: {path}")
    try:
        wrong = _not_safetensors(path)
        if wrong:
            raise FileError(f"{path} {wrong}")
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read as safetensors ({error}); it may be truncated: copy or download it again"
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None


_PICKLE = (
    "is a pickle{}: opening it can run any code, and convlora never unpickles. Ask for the .safetensors, or, if you "
    "trust its source, open it yourself with torch.load(path, weights_only=True) and save its tensors with safetensors"
)


def _not_safetensors(path: Path) -> str | None:
    """What a file evidently is instead, from its first bytes and its size; None if it may be safetensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "is empty; copy or download it again"
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{":  # eight bytes of length, then JSON: nothing else begins so
        if header <= size - 8:
            return None
        return f"announces a header of {header:,} bytes, but {size - 8:,} follow: it is truncated or damaged"
    if start.startswith(b"PK\x03\x04"):
        return _PICKLE.format(" in a zip archive, as torch.save writes it")
    if start[0] == 0x80 and 1 < start[1] < 6:
        return _PICKLE.format("")
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not an adapter: the download went wrong"
    return None


def metadata_of(record: Record, extra: Mapping[str, str]) -> dict[str, str]:
    taken = sorted(set(extra) & _OWN)
    if taken:
        raise FileError(f"metadata fields {taken} are written by convlora itself; choose other names")
    return {
        "format": "convlora",
        "format_version": FORMAT_VERSION,
        "method": record.method,
        "options": _compact(record.options),
        "ranks": _compact(_grouped(record.ranks)),
        "trained": _compact(record.trained),
        "buffers": _compact(record.buffers),
        "base_fingerprint": record.base_fingerprint,
        **({"strengths": _compact(record.strengths)} if record.strengths else {}),
        "library_version": __version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **record.told(extra),
    }


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))  # a rank-1 adapter is small enough for spaces to count


def _grouped(ranks: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The commonest pair once, as "*" with the number of its layers, whose names are the tensors'; then the others."""
    if not ranks:
        return {}
    common, count = Counter(ranks.values()).most_common(1)[0]
    return {"*": (*common, count), **{layer: pair for layer, pair in ranks.items() if pair != common}}


def record_of(path: Path, metadata: Mapping[str, str], keys: Iterable[str], name: str = "default") -> Record:
    """The record that a file's metadata and its tensors' keys describe, checked, under the adapter's name on the model.

    Layers are in the order of their names, b8 before b16, which need not be the model's.
    """
    if metadata.get("format") != "convlora":
        raise FileError(f"{path} is no convlora adapter (metadata format={metadata.get('format')!r})")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise FileError(
            f"{path} has format version {metadata.get('format_version')!r}, this convlora {__version__} reads "
            f"{FORMAT_VERSION!r}: pip install --upgrade convlora"
        )
    try:
        ranks = _ungrouped(_json(metadata, "ranks", dict), keys)
        trained, buffers = _names(metadata, "trained"), _names(metadata, "buffers")
        strengths = {name: float(value) for name, value in _json(metadata, "strengths", dict).items()}
        if foreign := sorted(set(strengths) - {*ranks, *trained}):
            raise ValueError(f"strengths for {foreign}, which the file does not hold")
        options = _json(metadata, "options", dict)
        if "path" not in options:
            raise ValueError("options lack a path")
        return Record(
            name,
            metadata["method"],
            ranks,
            options,
            trained,
            buffers,
            metadata["base_fingerprint"],
            strengths,
            {key: value for key, value in metadata.items() if key not in _OWN},
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: damaged adapter metadata ({type(error).__name__}: {error})") from None


def _ungrouped(told: dict[str, Any], keys: Iterable[str]) -> dict[str, tuple[int, int]]:
    common = told.pop("*", None)
    ranks = {layer: _ranks_of(layer, pair) for layer, pair in told.items()}
    if common is None:
        return ranks
    if not isinstance(common, list) or len(common) != 3:
        raise ValueError(f'the ranks of "*" must be [nominal rank, inner size, number of layers], not {common!r}')
    layers = {key.rpartition("/")[0] for key in keys if not key.startswith("train/")} - set(ranks)
    if len(layers) != common[2]:
        found = ", ".join(sorted(layers, key=_counting)) or "none"
        raise ValueError(f"of {common[2]} layers of common rank there are tensors of {len(layers)}: {found}")
    ranks |= dict.fromkeys(layers, _ranks_of("*", common[:2]))
    return {layer: ranks[layer] for layer in sorted(ranks, key=_counting)}


def _counting(name: str) -> list[tuple[int, str]]:
    """Sorts names with their numbers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _json(metadata: Mapping[str, str], field: str, kind: type) -> Any:
    """A JSON field of the metadata, of this type; NaN and Infinity, which are no JSON, are refused."""
    text = metadata.get(field, "{}") if field == "strengths" else metadata[field]
    value = json.loads(text, parse_constant=_no_constant)
    if not isinstance(value, kind):
        raise ValueError(f"{field} must be a JSON {'object' if kind is dict else 'list'}, not {text[:40]}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _names(metadata: Mapping[str, str], field: str) -> list[str]:
    names = _json(metadata, field, list)
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"{field} must be a list of different names")
    return list(names)


def _ranks_of(layer: str, pair: Any) -> tuple[int, int]:
    whole = isinstance(pair, list) and len(pair) == 2 and all(type(rank) is int and rank > 0 for rank in pair)
    if not whole:
        raise ValueError(f"the ranks of layer {layer!r} must be two whole numbers above 0, not {pair!r}")
    return pair[0], pair[1]


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast to a file's dtype; integers, and scalars such as LoRA's scale, keep theirs."""
    if dtype is None or not tensor.is_floating_point() or tensor.ndim == 0:
        return tensor
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ConvloraError(f"dtype must be float32, float16, bfloat16 or float64, not {dtype}")
    smaller = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(smaller.isfinite(), tensor.isfinite()):
        raise FileError(
            f"a value of {float(tensor.abs().max()):.3g} does not fit in float16, which ends at 65,504; "
            "save with dtype=torch.bfloat16, or keep float32"
        )
    return smaller
