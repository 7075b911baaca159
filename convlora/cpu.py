"""Two settings of a process that computes on a CPU for long."""

from __future__ import annotations

import ctypes
import os

import torch

# Of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def prepare_cpu() -> None:
    """Make this process compute faster on a CPU. The `convlora` program does so; in your own, call it first.

    Freed memory stays with the process, for the next tensors. By default, glibc gives large pieces back to the
    system at once, which then clears every page of the next ones; at 512² a step of training spends up to 44 % of its
    time so. The process holds on to the most it ever needed. Nothing is changed with another C library, or where the
    environment says how to allocate (`MALLOC_…`, `GLIBC_TUNABLES`, `LD_PRELOAD`).

    Denormal numbers, which a CPU computes with a hundred times more slowly, become zero.
    """
    torch.set_flush_denormal(True)
    keep_memory()


def keep_memory() -> bool:
    """The first of the two settings of `prepare_cpu`; whether it was made."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ):
        return False
    glibc = _glibc()
    if glibc is None:
        return False
    return bool(glibc.mallopt(_MMAP_MAX, 0) and glibc.mallopt(_TRIM_THRESHOLD, -1))


class _Held(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def kept_memory() -> int:
    """Bytes that this process has freed and not given back; 0 where nobody tells."""
    glibc = _glibc()
    if glibc is None or not hasattr(glibc, "mallinfo2"):  # from glibc 2.33 on
        return 0
    glibc.mallinfo2.restype = _Held
    return int(glibc.mallinfo2().fordblks)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
