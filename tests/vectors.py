"""Reference tensors made with the official code, and the loading of parameters from the recipe they were made with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from recipe import det as _det
from recipe import param
from safetensors import safe_open
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


@cache
def vectors(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(meta, tensors) of one reference file."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as f:
        return json.loads(f.metadata()["meta"]), {key: f.get_tensor(key) for key in f.keys()}


def det(name: str, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.from_numpy(_det(name, shape, scale, shift))


def load_recipe(module: nn.Module, prefix: str) -> nn.Module:
    """Fill every parameter and buffer from the recipe; resampling filters stay as constructed."""
    state = module.state_dict()
    for key, value in state.items():
        made = param(f"{prefix}.{key}", tuple(value.shape))
        if made is not None:
            state[key] = torch.from_numpy(made)
    module.load_state_dict(state)
    return module.eval()


def check(got: Tensor, want: Tensor, limit: float, mean: float | None = None) -> None:
    """Largest (and mean) absolute difference within limits."""
    assert got.shape == want.shape, (got.shape, want.shape)
    difference = (got.double() - want.double()).abs()
    assert difference.max() <= limit, f"max difference {difference.max():.2e} > {limit:.0e}"
    if mean is not None:
        assert difference.mean() <= mean, f"mean difference {difference.mean():.2e} > {mean:.0e}"
