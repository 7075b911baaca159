"""Put a saved adapter on a model: everything is checked before the model is touched."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from convlora import files
from convlora.adapter import Adapter, check_state
from convlora.errors import ConvloraError, FileError
from convlora.fingerprint import difference, fingerprint
from convlora.inject import build, check_name, install


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", *, check_base: bool = True) -> Adapter:
    """Load an adapter file onto the base model it was trained on; on any error the model stays as it was.

    Args:
        name: the adapter's name on this model.
        check_base: compare the base model's fingerprint with the file's. Turn it off only to try an adapter
            on a relative of its base.

    Raises:
        FileError: the file is missing, truncated, no adapter, of a newer format, or of another base model.
        ConvloraError: the name is taken.
    """
    path = Path(path)
    tensors, metadata = files.read(path)
    record = files.record_of(path, metadata, name)
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
        changes, trained = build(model, record)
        buffers = {name: model.get_buffer(name) for name in record.buffers}
    except (AttributeError, KeyError, TypeError, ConvloraError) as error:
        raise FileError(f"{path} does not fit this {type(model).__name__}: {error}; nothing was loaded") from None
    own = {f"{layer}/{key}": value for layer, change in changes.items() for key, value in change.state_dict().items()}
    own |= {f"train/{parameter}": full.value for parameter, full in trained.items()}
    check_state(own | {f"train/{buffer}": tensor for buffer, tensor in buffers.items()}, tensors, str(path))
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
    adapter = install(model, record, changes, trained)
    with torch.no_grad():
        for buffer, tensor in buffers.items():  # after install, which remembers the base's values
            tensor.copy_(tensors[f"train/{buffer}"])
    return adapter
