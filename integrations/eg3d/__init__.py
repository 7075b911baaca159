"""EG3D: the generator, its cameras, and personalisation of it. Heavier parts are imported when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.cameras import label
from convlora.integrations.eg3d.checkpoint import load_generator, save_generator
from convlora.integrations.eg3d.configs import CONFIGS
from convlora.integrations.eg3d.generator import TriPlaneGenerator

# public name -> (module in this package, attribute; None = the module itself)
_LAZY: dict[str, tuple[str, str | None]] = {
    "load_album": ("album", "load_album"),
    "prepare": ("prepare", "prepare"),
    "find_anchors": ("anchors", "find_anchors"),
    "personalize": ("personalize", "personalize"),
    "inject_personal": ("personalize", "inject_personal"),
    "tasks": ("tasks", None),
    "metrics": ("metrics", None),
    "lab": ("lab", None),
    "report": ("report", None),
}

__all__ = ["CONFIGS", "TriPlaneGenerator", "cameras", "label", "load_generator", "save_generator", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = import_module(f"{__name__}.{module}")
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `eg3d.prepare` a function once the module of that name is imported, which would take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        attribute = _LAZY.get(name, ("", None))[1]
        super().__setattr__(name, getattr(value, attribute) if attribute and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
