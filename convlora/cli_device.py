"""Where commands compute."""

from __future__ import annotations

from convlora.errors import ConvloraError


def prepare_device(name: str) -> None:
    """Check `--device` before long work begins, and set the CPU up for it.

    Raises:
        ConvloraError: the device is not there.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConvloraError(f"--device {name}: not usable here ({first}); cpu always is") from None
    # Behind an opaque surface transmittances are denormal numbers; a fifth of a CPU step goes into them.
    torch.set_flush_denormal(True)
