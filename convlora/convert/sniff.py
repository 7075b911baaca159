"""Whose format a file or folder is in, from its keys and metadata alone; no tensor is read."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from convlora import files
from convlora.convert import diffusers, peft
from convlora.errors import FileError

_KEYS = {  # the end of a key says whose it is
    "kohya": r"\.(lora_(down|up|mid)\.weight|hada_\w+|lokr_\w+|dora_scale)$",
    "diffusers": r"(\.lora_[AB]\.weight|\.lora_magnitude_vector|[._]lora\.(down|up)\.weight)$",
    "loralib": r"\.lora_[AB]$",
}


def sniff(path: str | Path) -> str:
    """ "convlora", "peft", "kohya", "diffusers" or "loralib": the format of an adapter file or folder.

    Raises `FileError` if it is none of these, or no safetensors.
    """
    path = Path(path)
    if path.is_dir():
        if (path / peft.CONFIG).is_file():
            return "peft"
        if (path / "pytorch_lora_weights.safetensors").is_file():
            return "diffusers"
        raise FileError(f"{path} is a folder without {peft.CONFIG} or pytorch_lora_weights.safetensors")
    keys, metadata = _header(path)
    if metadata.get("format") == "convlora":
        return "convlora"
    if diffusers.METADATA in metadata:
        return "diffusers"
    if keys and all(key.startswith(peft.PREFIX) for key in keys):
        return "peft"
    for kind, pattern in _KEYS.items():
        if any(re.search(pattern, key) for key in keys):
            return kind
    raise FileError(f"{path} is no adapter that convlora knows; its keys are {keys[:3]} and so on")


def _header(path: Path) -> tuple[list[str], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        files.read(path)  # raises the error that says what it is instead
        raise
