from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randomize(adapter, std: float = 0.1) -> None:
    """Give every trainable of an adapter a value that training could have given it."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


@pytest.fixture(name="randomize")
def _randomize():
    return randomize
