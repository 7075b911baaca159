"""The adaptation methods, one file each. A new method is one file and one line of `METHODS`."""

from __future__ import annotations

from convlora.methods.change import Change, LowRankChange
from convlora.methods.full import Full
from convlora.methods.lora import LoRA

#: name -> class; called as `METHODS[name](w0, rank=…, **options)` with w0 the matrix `(out, cols)`.
METHODS: dict[str, type[Change]] = {
    "lora": LoRA,
    "full": Full,
}

__all__ = ["METHODS", "Change", "Full", "LoRA", "LowRankChange"]
