"""The one place that imports numba: only the lab needs it, so a missing install is explained here."""

from __future__ import annotations

from typing import Any

from convlora.errors import ConvloraError

try:
    import numba
except ImportError as error:
    raise ConvloraError(
        'the lab draws its heads with numba, which is not installed: pip install "convlora[lab]"'
    ) from error

# numba's cache looks at the file a function lives in, not at the files it calls: after editing one of the
# jitted modules, delete lab/__pycache__ so that its callers are compiled again.
jit = numba.njit(cache=True, fastmath=True, error_model="numpy")
jit_parallel = numba.njit(cache=True, fastmath=True, error_model="numpy", parallel=True)
prange = numba.prange


def use_threads(count: int) -> None:
    """Let the parallel kernels use `count` threads, at most as many as numba was started with."""
    config: Any = numba.config
    numba.set_num_threads(max(1, min(count, config.NUMBA_NUM_THREADS)))
