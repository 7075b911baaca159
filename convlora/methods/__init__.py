"""The adaptation methods, one file each. A new method is one file and one line of `METHODS`."""

from __future__ import annotations

from convlora.methods.adalora import AdaLoRA
from convlora.methods.change import Change, LowRankChange
from convlora.methods.deft import DEFT
from convlora.methods.dora import DoRA
from convlora.methods.full import Full
from convlora.methods.lidb import LiDB
from convlora.methods.loha import LoHa
from convlora.methods.lokr import LoKr
from convlora.methods.lora import LoRA
from convlora.methods.loralib_view import LoralibView
from convlora.methods.para import PaRa
from convlora.methods.separable import Separable
from convlora.methods.svdiff import SVDiff
from convlora.methods.tucker import Tucker

#: name -> class; called as `METHODS[name](w0, rank=…, **options)` with w0 the matrix `(out, cols)`.
METHODS: dict[str, type[Change]] = {
    "lora": LoRA,
    "para": PaRa,
    "deft": DEFT,
    "lidb": LiDB,
    "svdiff": SVDiff,
    "adalora": AdaLoRA,
    "dora": DoRA,
    "tucker": Tucker,
    "loha": LoHa,
    "lokr": LoKr,
    "loralib_view": LoralibView,
    "separable": Separable,
    "full": Full,
}

__all__ = ["METHODS", "Change", "Full", "LoRA", "LowRankChange"]
