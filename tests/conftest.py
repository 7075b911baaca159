from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a green commit stays green; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("suite", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # the command line turns it on; hypothesis refuses to draw floats then


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """Nobody's weights are fetched or found: https leads nowhere, caches are empty."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("CONVLORA_CACHE", str(tmp_path_factory.getbasetemp() / "no_cache"))
    monkeypatch.delenv("CONVLORA_WEIGHTS", raising=False)


def randomize(adapter, std: float = 0.1) -> None:
    """Give every trainable of an adapter a value that training could have given it."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * std)


@pytest.fixture(name="randomize")
def _randomize():
    return randomize
