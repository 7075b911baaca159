"""Where commands compute, and how they tell."""

from __future__ import annotations

import argparse

from convlora.errors import ConvloraError


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--device`, `--quiet` and `--json`, of every verb that computes for a while."""
    parser.add_argument("--device", default="cpu", help='where to compute, e.g. "cuda" (default cpu)')
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def prepare_device(name: str) -> None:
    """Check `--device` before long work begins, and set the CPU up for it.

    Raises:
        ConvloraError: the device is not there.
    """
    import torch

    from convlora.cpu import prepare_cpu

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConvloraError(f"--device {name}: not usable here ({first}); cpu always is") from None
    prepare_cpu()  # behind an opaque surface, transmittances are denormal numbers: a fifth of a CPU step
