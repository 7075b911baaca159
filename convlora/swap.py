"""Hot-swap: the tensors of another file in place of an adapter's own, at the same addresses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora import files
from convlora.adapter import Adapter, check_state
from convlora.attach import frozen
from convlora.errors import ConvloraError, FileError, RankError
from convlora.fingerprint import difference
from convlora.inject import NOTES
from convlora.record import Record

# LoRA's tensors and the axis that counts its rank.
_RANK_AXIS = {"A": 0, "A0": 0, "B": 1, "B0": 1}


def swap(adapter: Adapter, source: str | Path | Mapping[str, Tensor]) -> None:
    """See `Adapter.swap`."""
    if adapter.merged:
        raise ConvloraError(f"adapter {adapter.name!r} is merged; unmerge() before you swap its tensors")
    other = None
    if isinstance(source, Mapping):
        state, whose = dict(source), f"adapter {adapter.name!r}, swapping in tensors"
    else:
        state, metadata = files.read(Path(source))
        other, whose = files.record_of(Path(source), metadata, state, adapter.name), str(source)
        _refuse_another_kind(adapter.record, other, whose)
    own = adapter.state_dict()
    filled = _filled(adapter, own, state, whose)
    check_state(own, filled, whose)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(filled[key])
        if other is not None:
            for name, change in {**adapter.layers, **adapter.trained}.items():
                change.strength.fill_(other.strengths.get(name, 1.0))
    # The adapter is now the other's: so are the person and the consent that its next file speaks of.
    kept = {key: value for key, value in adapter.record.metadata.items() if key not in ("person", "consent")}
    adapter.record.metadata = kept if other is None else dict(other.metadata)


def _refuse_another_kind(own: Record, other: Record, whose: str) -> None:
    if own.method != other.method:
        raise FileError(f"{whose} is {other.method!r}, adapter {own.name!r} is {own.method!r}; nothing was swapped")
    differs = difference(own.base_fingerprint, other.base_fingerprint)
    if differs:
        raise FileError(f"{whose} belongs to another base model, {differs}; nothing was swapped")
    # A LoRA is its tensors; of other methods, options such as LiDB's seed are part of the function.
    if own.method != "lora":
        for key in sorted({*own.options, *other.options} - {"path", "rank_per", *NOTES}):
            if own.options.get(key) != other.options.get(key):
                raise FileError(
                    f"{whose} has {key}={other.options.get(key)!r} where adapter {own.name!r} has "
                    f"{own.options.get(key)!r}; nothing was swapped"
                )


def _filled(adapter: Adapter, own: Mapping[str, Tensor], state: Mapping[str, Tensor], whose: str) -> dict[str, Tensor]:
    """The state in own's shapes as far as it can be had: zeros for what a smaller LoRA lacks,
    the base's values for what it did not train in full."""
    filled = dict(state)  # with its unknown keys, which check_state refuses
    present = {key.rpartition("/")[0] for key in state}
    slots = adapter.record.slots(adapter.model)
    base = {f"train/{name}": tensor for name, tensor in adapter._base_buffers().items()}
    base |= {key: frozen(slot, adapter.name) for key, slot in slots.items() if key.startswith("train/")}
    for key, tensor in own.items():
        layer, _, leaf = key.rpartition("/")
        if key in base:
            filled.setdefault(key, base[key])
        elif adapter.method != "lora":
            continue
        elif layer not in present:
            filled[key] = torch.zeros_like(tensor)
        elif key in state and leaf in _RANK_AXIS:
            filled[key] = _padded(state, key, tensor, whose)
    return filled


def _padded(state: Mapping[str, Tensor], key: str, tensor: Tensor, whose: str) -> Tensor:
    """A factor with zeros up to the rank of `tensor`."""
    layer, _, leaf = key.rpartition("/")
    given, axis = state[key], _RANK_AXIS[leaf]
    factors = [(state.get(f"{layer}/{name}"), along) for name, along in _RANK_AXIS.items()]
    ranks = {factor.shape[along] for factor, along in factors if factor is not None and factor.ndim == 2}
    if given.ndim != 2 or len(ranks) != 1:
        return given  # no pair of factors: check_state says what is wrong with it
    (rank,), room = ranks, tensor.shape[axis]
    if rank > room:
        raise RankError(
            f"{whose}: layer {layer!r} has rank {rank}, and there is room for {room}; nothing was swapped. Inject with "
            "the largest rank that is to be swapped in"
        )
    return F.pad(given, (0, 0, 0, room - rank) if axis == 0 else (0, room - rank))
