"""The handle of one adapter on one model, and the record of it that the model carries."""

from __future__ import annotations

import contextlib
import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from convlora import files
from convlora.attach import base_modules, base_parameters, detach, find_change, frozen, is_merged, merge, unmerge
from convlora.errors import ConvloraError, FileError, TargetError
from convlora.hub import push_to_hub
from convlora.layers import Slot, as_matrix
from convlora.methods import METHODS, Change, Full
from convlora.methods.change import settled
from convlora.record import Record

if TYPE_CHECKING:
    from convlora.analysis import WeightChanges

_REGISTRY = "_convlora"  # in the model's __dict__, so that deepcopy and torch.save take it along


@dataclass
class _Registry:
    trainable: list[str]  # parameters that were trainable before the first adapter froze them
    records: dict[str, Record] = field(default_factory=dict)
    base_buffers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    idle_buffers: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of adapters that are disabled
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # running ones that no file will hold


def register(model: nn.Module, record: Record) -> Adapter:
    """Enter a record into the model's registry; `convlora.inject` attaches the changes."""
    if _REGISTRY not in model.__dict__:
        trainable = [name for name, parameter in base_parameters(model) if parameter.requires_grad]
        model.__dict__[_REGISTRY] = _Registry(trainable)
    registry: _Registry = model.__dict__[_REGISTRY]
    registry.records[record.name] = record
    registry.base_buffers[record.name] = {name: _buffer(model, name).clone() for name in record.buffers}
    registry.statistics[record.name] = {
        name: tensor.clone() for name, tensor in _running_statistics(model) if name not in record.buffers
    }
    return Adapter(model, record.name)


class Adapter:
    """One named adapter on a model. `convlora.inject_lora` makes it; `Adapter.of(model)` finds it again."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name

    @staticmethod
    def of(model: nn.Module, name: str = "default") -> Adapter:
        """The handle of an adapter that is already on `model` (a deep copy or an unpickled model, say)."""
        if name not in Adapter.names(model):
            have = ", ".join(Adapter.names(model)) or "none"
            raise ConvloraError(f"{type(model).__name__} has no adapter named {name!r}; it has: {have}")
        return Adapter(model, name)

    @staticmethod
    def names(model: nn.Module) -> list[str]:
        """Names of the adapters on `model`, oldest first."""
        registry = model.__dict__.get(_REGISTRY)
        return list(registry.records) if registry is not None else []

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def record(self) -> Record:
        registry = self.model.__dict__.get(_REGISTRY)
        if registry is None or self.name not in registry.records:
            raise ConvloraError(f"adapter {self.name!r} was removed from this model")
        return cast(Record, registry.records[self.name])

    @property
    def method(self) -> str:
        return self.record.method

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.record.options)

    @property
    def layers(self) -> dict[str, Change]:
        """`{module name: change}` of the adapted layers, in model order."""
        return {layer: self._change(self.record.slot(self.model, layer)) for layer in self.record.ranks}

    @property
    def trained(self) -> dict[str, Full]:
        """`{parameter name: change}` of the tensors trained in full (`train=`)."""
        slots = {name: self.record.parameter_slot(self.model, name) for name in self.record.trained}
        return {name: cast(Full, self._change(slot)) for name, slot in slots.items()}

    @property
    def num_parameters(self) -> int:
        """Values in the change's own tensors, without those of `train=`."""
        return sum(p.numel() for change in self.layers.values() for p in change.parameters())

    @property
    def num_trainable(self) -> int:
        """All trainable values, those of `train=` included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def merged(self) -> bool:
        return any(is_merged(slot, self.name) for slot in self.record.slots(self.model).values())

    @property
    def enabled(self) -> bool:
        return all(change.enabled for change in self._changes())

    def parameters(self) -> Iterator[nn.Parameter]:
        """All trainable tensors, for an optimizer."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`("<module>/<tensor>", parameter)`, and `("train/<parameter>", parameter)` for those of `train=`."""
        for layer, change in self.layers.items():
            for tensor, parameter in change.named_parameters():
                yield f"{layer}/{tensor}", parameter
        for name, full in self.trained.items():
            yield f"train/{name}", full.value

    def delta(self, module_name: str) -> Tensor:
        """ΔW of one layer at its present strength, in the weight's own shape and raw units."""
        if module_name not in self.record.ranks:
            raise TargetError(
                f"adapter {self.name!r} has no layer {module_name!r}; it has {', '.join(self.record.ranks)}"
            )
        slot = self.record.slot(self.model, module_name)
        change, w0 = self._change(slot), frozen(slot, self.name)
        with settled(change):
            return (change.strength * change.delta(as_matrix(w0, slot.owner))).view(w0.shape)

    def summary(self) -> str:
        """A table: layer, matrix, rank, values, and how large ΔW is beside W₀."""
        rows = [("layer", "matrix", "rank", "values", "‖ΔW‖/‖W₀‖")]
        with torch.no_grad():
            for layer, change in self.layers.items():
                slot = self.record.slot(self.model, layer)
                w0 = frozen(slot, self.name)
                ratio = float(self.delta(layer).norm() / w0.norm().clamp_min(1e-30))
                out, cols = as_matrix(w0, slot.owner).shape
                values = sum(p.numel() for p in change.parameters())
                rows.append(
                    (
                        layer,
                        f"{out} × {cols}",
                        str(self.record.ranks[layer][1]),
                        f"{values:,}",
                        f"{ratio:.2%}",
                    )
                )
        rows += [(name, "trained in full", "", f"{full.value.numel():,}", "") for name, full in self.trained.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        head = f"adapter {self.name!r}: {self.method}, {len(self.layers)} layers, {self.num_trainable:,} trainable"
        return "\n".join([head, *lines])

    def __repr__(self) -> str:
        record = self.record
        return (
            f"<Adapter {self.name!r}: {record.method} on {len(record.ranks)} layers, {self.num_trainable:,} trainable>"
        )

    # ------------------------------------------------------------------------------------- switching it

    def set_strength(self, strength: float | Mapping[str, float]) -> None:
        """Scale ΔW: everywhere, or `{glob of module or parameter names: strength}`, first match wins, others stay."""
        self._refuse_if_merged("set its strength")
        globs = strength if isinstance(strength, Mapping) else {"*": strength}
        changes: dict[str, Change] = {**self.layers, **self.trained}
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in changes):
                raise TargetError(
                    f"set_strength: {glob!r} matches no layer of adapter {self.name!r}: {', '.join(changes)}"
                )
        for name, change in changes.items():
            value = next((value for glob, value in globs.items() if fnmatch.fnmatchcase(name, glob)), None)
            if value is not None:
                change.strength = torch.full_like(change.strength, value)

    def step(self) -> None:
        """Advance what a method does on a schedule: PaRa's warm-up and retraction, AdaLoRA's ranks.

        Call it in each training step between `optimizer.step()` and `zero_grad()`; for other methods it does nothing.
        """
        METHODS[self.method].after_step(self.layers)

    def enable(self) -> None:
        """Let the adapter act again."""
        self._switch(True)

    def disable(self) -> None:
        """Let the model compute exactly as without this adapter, until `enable()`."""
        self._refuse_if_merged("disable it")
        self._switch(False)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside `with adapter.disabled():` the model computes exactly as without this adapter."""
        was_merged, was_enabled = self.merged, self.enabled
        if was_merged:
            self.unmerge()
        self._switch(False)
        try:
            yield
        finally:
            self._switch(was_enabled)
            if was_merged:
                self.merge()

    def merge(self, keep: bool = True) -> None:
        """Write the change into the base weights: the model is then a plain one, with its own keys and classes.

        `keep=False` forgets the adapter for good; otherwise `unmerge()` puts the very same base tensors back.
        """
        self._refuse_if_merged("merge it again")
        if not self.enabled:
            raise ConvloraError(f"adapter {self.name!r} is disabled: call enable() before merge()")
        for slot in self.record.slots(self.model).values():
            merge(slot, self.name, keep)
        if not keep:
            self._forget(restore=False)

    def unmerge(self) -> None:
        """Undo `merge()`, bit for bit."""
        if not self.merged:
            raise ConvloraError(f"adapter {self.name!r} is not merged")
        for slot in self.record.slots(self.model).values():
            unmerge(slot, self.name)

    def remove(self) -> None:
        """Take the adapter off: weights, classes, state-dict keys and requires_grad are as before it came."""
        if self.merged:
            self.unmerge()
        self._switch(True)
        for slot in self.record.slots(self.model).values():
            detach(slot, self.name)
        self._forget(restore=True)

    # ------------------------------------------------------------------------------------- its tensors, its file

    def state_dict(self) -> dict[str, Tensor]:
        """`{"<module>/<tensor>" | "train/<parameter or buffer>": tensor}`, detached, sharing storage."""
        state = {
            f"{layer}/{key}": value
            for layer, change in self.layers.items()
            for key, value in change.state_dict().items()
        }
        state |= {f"train/{name}": full.value.detach() for name, full in self.trained.items()}
        registry: _Registry = self.model.__dict__[_REGISTRY]
        tuned = registry.idle_buffers.get(self.name, {})
        return state | {f"train/{name}": tuned.get(name, _buffer(self.model, name)) for name in self.record.buffers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in; keys and shapes must be exactly this adapter's, otherwise nothing changes."""
        own = self.state_dict()
        check_state(own, state, f"adapter {self.name!r}")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state[key])

    def save(self, path: str | Path, dtype: torch.dtype | None = None, **metadata: str) -> Path:
        """Write one safetensors file, atomically.

        `dtype` (float32, float16, bfloat16) is that of the tensors in the file; None keeps theirs. `metadata`
        adds text fields such as `base_model`, `person`, `consent`; later files of this adapter have them too.
        """
        tensors, record = self.to_be_saved()
        tensors = {key: files.cast(tensor, dtype) for key, tensor in tensors.items()}
        written = files.write(Path(path), tensors, files.metadata_of(record, metadata))
        self.record.metadata = record.told(metadata)
        return written

    push_to_hub = push_to_hub

    def to_be_saved(self) -> tuple[dict[str, Tensor], Record]:
        """The tensors of a file and the record that describes them: layers pruned to rank 0 are left out.

        Raises `FileError` if a value is NaN or infinite. Warns if running statistics moved since the adapter came
        that are not among the tensors: whoever loads the file gets the base's.
        """
        self._warn_of_statistics()
        state = {key: value for key, value in self.state_dict().items() if key.startswith("train/")}
        ranks, tensors = dict(self.record.ranks), dict[str, Tensor]()
        for layer, change in self.layers.items():
            kept, rank = change.saved()
            tensors |= {f"{layer}/{key}": value for key, value in kept.items()}
            if rank is not None:
                ranks[layer] = (rank, rank)
        ranks = {layer: pair for layer, pair in ranks.items() if pair[0]}
        strengths = {name: float(change.strength) for name, change in {**self.layers, **self.trained}.items()}
        strengths = {n: value for n, value in strengths.items() if value != 1 and n in {*ranks, *self.record.trained}}
        check_finite(tensors | state, f"adapter {self.name!r} cannot be saved: nothing was written")
        return tensors | state, replace(self.record, ranks=ranks, strengths=strengths)

    def swap(self, source: str | Path | Mapping[str, Tensor]) -> None:
        """Put the tensors of another adapter file, or of a state dict, in place of this adapter's own.

        Nothing is allocated on the model and nothing compiled again (`torch.compile`), so a server can change persons
        between two requests. The other adapter must have this one's method, base and layers. A LoRA may have lower
        ranks and fewer layers, and any adapter fewer tensors trained in full: there the rest becomes zero. So
        inject with the largest rank that is to come. A part that was filled with zeros does not train any more.

        Raises:
            FileError, RankError: the file does not fit, and the message says why; nothing has changed.
            ConvloraError: this adapter is merged.
        """
        from convlora.swap import swap

        swap(self, source)

    def weight_change(self, by: Literal["layer", "block"] = "layer") -> WeightChanges:
        """‖ΔW‖/‖W₀‖ per layer or per block, in effective units; see `convlora.weight_change`."""
        from convlora.analysis import weight_change

        return weight_change(self, by)

    # ------------------------------------------------------------------------------------------------- inside

    def _change(self, slot: Slot) -> Change:
        change = find_change(slot, self.name)
        if change is None:
            raise ConvloraError(f"the change of adapter {self.name!r} on {slot.parameter} was taken off by other code")
        return change

    def _base_buffers(self) -> dict[str, Tensor]:
        """The base's own values of the buffers in `record.buffers`."""
        registry: _Registry = self.model.__dict__[_REGISTRY]
        return registry.base_buffers[self.name]

    def _warn_of_statistics(self) -> None:
        registry: _Registry = self.model.__dict__[_REGISTRY]
        now = dict(_running_statistics(self.model))
        moved = [
            name
            for name, tensor in registry.statistics.get(self.name, {}).items()
            if name in now and not torch.equal(now[name], tensor.to(now[name].device, now[name].dtype))
        ]
        if moved:
            owners = list(dict.fromkeys(name.rpartition(".")[0] for name in moved))
            warnings.warn(
                f"running statistics of {', '.join(owners[:5])}{', …' if len(owners) > 5 else ''} moved while adapter "
                f"{self.name!r} was on, and its file will not hold them: name these modules in train=, or keep them in "
                "eval mode while you train",
                stacklevel=3,
            )

    def _changes(self) -> list[Change]:
        return [self._change(slot) for slot in self.record.slots(self.model).values()]

    def _switch(self, on: bool) -> None:
        for change in self._changes():
            change.enabled = on
        # A buffer of a module trained in full (a running mean) has no property to hide behind: swap it.
        registry: _Registry = self.model.__dict__[_REGISTRY]
        idle = registry.idle_buffers.get(self.name)
        if on and idle is not None:
            for name, tensor in registry.idle_buffers.pop(self.name).items():
                _set_buffer(self.model, name, tensor)
        elif not on and idle is None:
            registry.idle_buffers[self.name] = {name: _buffer(self.model, name) for name in self.record.buffers}
            for name, tensor in registry.base_buffers[self.name].items():
                _set_buffer(self.model, name, tensor.clone().to(_buffer(self.model, name).device))

    def _refuse_if_merged(self, action: str) -> None:
        if self.merged:
            raise ConvloraError(f"adapter {self.name!r} is merged; unmerge() before you {action}")

    def _forget(self, restore: bool) -> None:
        registry: _Registry = self.model.__dict__[_REGISTRY]
        if restore:
            for name, tensor in registry.base_buffers[self.name].items():
                _buffer(self.model, name).copy_(tensor)
        del registry.records[self.name], registry.base_buffers[self.name], registry.statistics[self.name]
        if not registry.records:
            trainable = set(registry.trainable)
            for name, parameter in base_parameters(self.model):
                parameter.requires_grad_(name in trainable)
            del self.model.__dict__[_REGISTRY]


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], whose: str) -> None:
    """Raise `FileError` unless `state` has exactly the keys and shapes of `own`, and values that can stand for them."""
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or unexpected:
        raise FileError(
            f"{whose}: missing tensors {missing[:5]}, unexpected tensors {unexpected[:5]}; nothing was loaded"
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise FileError(
                f"{whose}: tensor {key!r} has shape {list(state[key].shape)} where {list(tensor.shape)} belongs; "
                "nothing was loaded"
            )
        fits = state[key].dtype in _FLOATS if tensor.is_floating_point() else state[key].dtype == tensor.dtype
        if not fits:
            wanted = "float16, bfloat16, float32 or float64" if tensor.is_floating_point() else str(tensor.dtype)[6:]
            raise FileError(
                f"{whose}: tensor {key!r} is {str(state[key].dtype)[6:]} where {wanted} belongs; nothing was loaded"
            )
    check_finite(state, f"{whose}: nothing was loaded")


def check_finite(tensors: Mapping[str, Tensor], whose: str) -> None:
    """Raise `FileError` if a tensor holds NaN or an infinite value."""
    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise FileError(f"{whose}; NaN or infinite values in {', '.join(bad[:5])}{' …' if len(bad) > 5 else ''}")


def _running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in base_modules(model):
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for name in ("running_mean", "running_var"):
                tensor = module._buffers.get(name)
                if tensor is not None and not tensor.is_meta:
                    yield f"{prefix}.{name}" if prefix else name, tensor


def _buffer(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return cast(Tensor, model.get_submodule(owner)._buffers[leaf])


def _set_buffer(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = tensor
