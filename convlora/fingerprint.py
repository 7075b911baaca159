"""A cheap identity of a base model: hashes over its parameters' names and shapes, and over a sample of values."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from convlora.attach import base_parameters

_SAMPLE = 64  # values per tensor


def fingerprint(model: nn.Module) -> str:
    """`"<structure>-<values>"`. Values are rounded to bfloat16 first, so that a model cast to it keeps its own."""
    structure, sampled = hashlib.sha256(), []
    for name, parameter in base_parameters(model):
        structure.update(f"{name}:{tuple(parameter.shape)};".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        sampled.append(flat[::step][:_SAMPLE].to(torch.bfloat16))
    if not sampled or sampled[0].is_meta:
        return f"{structure.hexdigest()[:16]}-none"
    values = torch.cat(sampled).cpu().view(torch.int16).numpy().tobytes()
    return f"{structure.hexdigest()[:16]}-{hashlib.sha256(values).hexdigest()[:16]}"


def difference(expected: str, actual: str) -> str | None:
    """What two fingerprints say of their models, in words; None if they are of the same model."""
    if expected == actual:
        return None
    if expected.partition("-")[0] != actual.partition("-")[0]:
        return "another architecture (parameter names or shapes differ)"
    return "the same architecture with other weights"
