"""What an adapter is, apart from its tensors: enough to build it again on the same base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convlora.errors import ConvloraError
from convlora.layers import Slot, find_slot


@dataclass
class Record:
    """One adapter's name, method and options, and which layers, parameters and buffers of its model it concerns."""

    name: str
    method: str
    ranks: dict[str, tuple[int, int]]  # {module name: (nominal rank, inner size)}
    options: dict[str, Any]
    trained: list[str]  # parameter names
    buffers: list[str]  # buffer names, saved with the trained tensors
    base_fingerprint: str
    #: {module or parameter name: strength} of a saved adapter where it is not 1; on a model, the changes hold it.
    strengths: dict[str, float] = field(default_factory=dict)
    #: Text fields (`base_model`, `person`, `consent`, …) that it was loaded or saved with; every file gets them.
    metadata: dict[str, str] = field(default_factory=dict)

    def told(self, more: Mapping[str, str]) -> dict[str, str]:
        """`metadata` with more fields; one person's consent is never taken for that of another."""
        kept = dict(self.metadata)
        if more.get("person", kept.get("person")) != kept.get("person"):
            kept.pop("consent", None)
        return {**kept, **{key: str(value) for key, value in more.items()}}

    def slot(self, model: nn.Module, layer: str) -> Slot:
        slot = find_slot(model.get_submodule(layer))
        if slot is None:
            raise ConvloraError(f"module {layer!r} no longer holds a weight that can be adapted")
        return slot

    def parameter_slot(self, model: nn.Module, parameter: str) -> Slot:
        owner, _, name = parameter.rpartition(".")
        slot = Slot(model.get_submodule(owner), name)
        if slot.owner._parameters.get(name) is None:
            raise ConvloraError(f"the model has no parameter {parameter!r}")
        return slot

    def slots(self, model: nn.Module) -> dict[str, Slot]:
        """Every slot this adapter acts on, by its name in files: `<module>` or `train/<parameter>`."""
        layers = {layer: self.slot(model, layer) for layer in self.ranks}
        return layers | {f"train/{name}": self.parameter_slot(model, name) for name in self.trained}
