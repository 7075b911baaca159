"""With how many bits tuning computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from convlora.errors import ConvloraError

#: "float32": all of it; "tf32": products of 10 bits of mantissa on CUDA, elsewhere as float32; "bfloat16": autocast,
#: with cameras, sampling and ray marching in float32. None, where it may be given: as torch's own flags say.
Precision = Literal["float32", "tf32", "bfloat16"]


@contextlib.contextmanager
def computing_in(precision: Precision | None, device: torch.device) -> Iterator[None]:
    """Inside, models compute so; afterwards torch's flags are as they were. Backward belongs inside too.

    Raises `ConvloraError` for a precision of another name.
    """
    if precision is None:
        yield
        return
    if precision not in get_args(Precision):
        raise ConvloraError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
    if precision == "bfloat16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
