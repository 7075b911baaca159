"""Published weights from their files into a network: every tensor is checked before the network is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from convlora import files
from convlora.errors import FileError


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, or of a `.pth`/`.pt` that holds tensors alone.

    PyTorch's files are opened with `weights_only=True`, which runs no code from them.

    Raises:
        FileError: missing, damaged, not a file of tensors by name, or one that wants to run code.
    """
    path = Path(path)
    if path.suffix.lower() not in (".pth", ".pt", ".bin", ".ckpt"):
        return files.read(path)[0]
    if not path.is_file():
        raise FileError(f"no such file: {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for damaged files torch.load raises anything from EOFError to KeyError
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"{path} is no file of tensors alone, which is all that is opened here ({first}): fetch it again, or save "
            "its state dict as .safetensors"
        ) from None
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise FileError(f"{path} holds a {type(found).__name__}, not tensors by name (a state dict)")
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def named(
    state: Mapping[str, Tensor], keys: Iterable[str], renames: Sequence[tuple[str, str]] = ()
) -> dict[str, Tensor]:
    """`state` under the names of `keys`: renamed by (pattern, replacement), freed of a prefix all of them share.

    What `keys` lack is left out: classifiers behind the features, counters of batches.
    """
    wanted = set(keys)
    for pattern, replacement in renames:
        state = {re.sub(pattern, replacement, key): tensor for key, tensor in state.items()}
    if not wanted & set(state):
        first = min(wanted)
        prefixes = {key.removesuffix(first) for key in state if key.endswith(f".{first}")}
        if len(prefixes) == 1:
            prefix = prefixes.pop()
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return {key: tensor for key, tensor in state.items() if key in wanted}


def fill(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put `state` into `net` as float32, all of it or, with an error, nothing.

    Raises:
        FileError: tensors are missing, of another shape, or not finite; the message names them and `source`.
    """
    own = {key: tensor for key, tensor in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    if missing := [key for key in own if key not in state]:
        raise FileError(f"{source} lacks {_some(missing)}: it is of another network, or only a part of it")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if state[key].shape != tensor.shape
    ]
    if shapes:
        raise FileError(f"{source} does not fit: {_some(shapes)}; it is of another network")
    if damaged := [key for key in own if not state[key].isfinite().all()]:
        raise FileError(f"{source} holds values that are not finite in {_some(damaged)}: it is damaged, fetch it again")
    net.load_state_dict({key: state[key].float() for key in own}, strict=False)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
