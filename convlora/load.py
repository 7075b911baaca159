"""Put a saved adapter on a model: everything is checked before the model is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from convlora import files
from convlora.adapter import Adapter
from convlora.attach import base_modules
from convlora.errors import ConvloraError, FileError, HubError, RankError
from convlora.fingerprint import difference, fingerprint
from convlora.hub import ADAPTER, pull
from convlora.inject import build, check_name, fill, install
from convlora.layers import as_matrix
from convlora.model_card import is_hub_id
from convlora.record import Record


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    check_base: bool = True,
    filename: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Adapter:
    """Load an adapter onto the base model it was trained on; on any error the model stays as it was.

    Args:
        path: an adapter file, or `"user/name"` on the Hub. What exists here, is a `Path`, ends in .safetensors or
            starts like a path (`./`, `/`, `~`) is a file.
        name: the adapter's name on this model.
        check_base: compare the base model's fingerprint with the file's. Turn it off only to try an adapter
            on a relative of its base.
        filename, subfolder, revision, token, endpoint: for a Hub id only, as for `convlora.hub.pull`.

    Raises:
        FileError: the file is missing, truncated, no adapter, of a newer format, or of another base model.
        HubError: the Hub has no such repository, revision or file, gives no access, or cannot be reached.
        ConvloraError: the name is taken.
    """
    if is_hub_id(path):
        check_name(model, name)
        repo_id, file = str(path), filename or ADAPTER
        try:
            path = pull(repo_id, file, subfolder=subfolder, revision=revision, token=token, endpoint=endpoint)
        except HubError as error:
            raise HubError(f"no file {repo_id!r} here, and from the Hub: {error}") from error
    elif any(value is not None for value in (filename, subfolder, revision, token, endpoint)):
        raise FileError(
            f"filename, subfolder, revision, token and endpoint are for adapters on the Hub, written user/name; "
            f"{str(path)!r} is a file"
        )
    path = Path(path)
    tensors, metadata = files.read(path)
    record = files.record_of(path, metadata, tensors, name)
    record.ranks = _in_model_order(model, record.ranks)
    check_name(model, name)
    differs = difference(record.base_fingerprint, actual := fingerprint(model))
    if differs and check_base:
        named = f" (it was trained on {metadata['base_model']!r})" if "base_model" in metadata else ""
        raise FileError(
            f"{path} belongs to another base model{named}: this {type(model).__name__} is {differs}. "
            f"Fingerprint in the file {record.base_fingerprint}, of the model {actual}. Load the right base, or "
            "pass check_base=False to try anyway"
        )
    try:
        check_ranks(model, record, tensors)
        with _random_state_kept(model):  # the fresh factors are overwritten below
            changes, trained = build(model, record)
        for buffer in record.buffers:
            model.get_buffer(buffer)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, ConvloraError) as error:
        raise FileError(f"{path} does not fit this {type(model).__name__}: {error}; nothing was loaded") from error
    buffers = fill(model, record, changes, trained, tensors, str(path))
    try:
        return install(model, record, changes, trained, buffers)
    except ConvloraError as error:
        raise FileError(f"{path}: {error}; nothing was loaded") from error


def check_ranks(model: nn.Module, record: Record, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse ranks that no tensor of the file bears out, before memory is taken for them."""
    largest: dict[str, int] = {}
    for key, tensor in tensors.items():
        layer = key.rpartition("/")[0]
        largest[layer] = max(largest.get(layer, 0), *tensor.shape, 0)
    for layer, ranks in record.ranks.items():
        slot = record.slot(model, layer)
        limit = max(largest.get(layer, 0), *as_matrix(slot.tensor, slot.owner).shape)
        if max(ranks) > limit:
            raise RankError(f"layer {layer!r}: rank {max(ranks)} is above {limit}, its largest dimension")


def _in_model_order(model: nn.Module, ranks: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Layers that the model does not have stay, at the end: they are what an error will name."""
    known = {name: ranks[name] for name, _ in base_modules(model) if name in ranks}
    return {**known, **ranks}


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]):
        yield
