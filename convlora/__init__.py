"""convlora: parameter-efficient adapters for convolutional generators.

import convlora

adapter = convlora.inject_lora(model, rank=1)  # in place; the output stays the same until you train
optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-3)
...
adapter.save("me.safetensors")
convlora.load_adapter(fresh_model, "me.safetensors")
"""

from convlora import convert as convert
from convlora._version import __version__ as __version__
from convlora.adapter import Adapter as Adapter
from convlora.analysis import conflict as conflict
from convlora.analysis import weight_change as weight_change
from convlora.compose import compose as compose
from convlora.cpu import prepare_cpu as prepare_cpu
from convlora.errors import ConvloraError as ConvloraError
from convlora.extract import extract as extract
from convlora.inject import inject as inject
from convlora.inject import inject_lora as inject_lora
from convlora.layers import register_layer as register_layer
from convlora.load import load_adapter as load_adapter
from convlora.methods import METHODS as METHODS
from convlora.paths import explain as explain
from convlora.targets import adaptable as adaptable

__all__ = [
    "METHODS",
    "Adapter",
    "ConvloraError",
    "adaptable",
    "compose",
    "conflict",
    "convert",
    "explain",
    "extract",
    "inject",
    "inject_lora",
    "load_adapter",
    "prepare_cpu",
    "register_layer",
    "weight_change",
]
