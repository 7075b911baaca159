"""The same LoRA by other libraries, as they come: each a function of a network and a rank, like those of `_cases`."""

from __future__ import annotations

import copy
import logging

import _common as bench
from _cases import randomize
from torch import Tensor, nn


class Refused(Exception):
    """The library cannot adapt this network, in its own words; or it is not installed."""


def peft(network: nn.Module, rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise Refused("not installed: pip install peft") from None
    names = _layers(network)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names)
    try:
        model = get_peft_model(copy.deepcopy(network), config)
    except ValueError as error:
        raise Refused(str(error).partition(". ")[0]) from None
    randomize(p for p in model.parameters() if p.requires_grad)
    return model


def locon(network: nn.Module, rank: int) -> nn.Module:
    try:
        from lycoris import create_lycoris  # type: ignore[import-untyped]
    except ImportError:
        raise Refused("not installed: pip install lycoris-lora") from None
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model = copy.deepcopy(network).requires_grad_(False)
    adapter = create_lycoris(model, 1.0, linear_dim=rank, linear_alpha=rank, algo="locon", preset="full")
    if len(adapter.loras) < len(_layers(network)):
        raise Refused(f"adapts {len(adapter.loras)} of {len(_layers(network))} layers")
    adapter.apply_to()
    randomize(adapter.parameters())
    return _Together(model, adapter)


class _Together(nn.Module):
    """A network and its adapter, which changed the network's forward, so that the parameters of both are found."""

    def __init__(self, network: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.network, self.adapter = network, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _layers(network: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


def versions() -> dict[str, str | None]:
    return {name: bench.version(name) for name in ("peft", "lycoris-lora")}


PEERS = {"peft": peft, "locon": locon}
