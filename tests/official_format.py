"""Checkpoints in the form NVIDIA's training programs give them, made from our generators.

Python's own pickler writes them, from objects whose classes and functions stand in for the official ones: same names,
same calls, same states. The stand-ins are in `sys.modules` only while writing, and each raises if it is ever called.
"""

from __future__ import annotations

import collections
import contextlib
import io
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

# the classes that official files mention by name, without the persistence call
BY_REFERENCE = {
    "OSGDecoder": "training.triplane",
    "ImportanceRenderer": "training.volumetric_rendering.renderer",
    "MipRayMarcher2": "training.volumetric_rendering.ray_marcher",
    "RaySampler": "training.volumetric_rendering.ray_sampler",
}
SOURCE = "raise SystemExit('the source text of a checkpoint was executed')\n" * 400
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def _function(module: str, name: str) -> Any:
    def stand_in(*_: object) -> None:
        raise AssertionError(f"{module}.{name} was called")

    stand_in.__module__, stand_in.__qualname__ = module, name
    return stand_in


def _class(module: str, name: str, base: type = object) -> Any:
    return type(name, (base,), {"__module__": module})


RECONSTRUCT = _function("torch_utils.persistence", "_reconstruct_persistent_obj")
EASY_DICT = _class("dnnlib.util", "EasyDict", dict)
CLASSES = {name: _class(module, name) for name, module in BY_REFERENCE.items()}
NUMPY_1 = {name: _function("numpy.core.multiarray", name) for name in ("scalar", "_reconstruct")}


class Persistent:
    """An object of a class under NVIDIA's persistence decorator."""

    def __init__(self, class_name: str, state: dict[str, Any], version: int = 6) -> None:
        self.meta = dict(type="class", version=version, module_src=SOURCE, class_name=class_name, state=state)

    def __reduce__(self) -> tuple[Any, ...]:
        return RECONSTRUCT, (self.meta,)


def official(module: nn.Module, arguments: dict[str, Any] | None = None, **attributes: Any) -> Any:
    """The object graph that the official code would pickle for one of our modules."""
    name = type(module).__name__
    name = getattr(module, "name", name) if name == "Superresolution" else name
    state: dict[str, Any] = dict(
        training=False,
        _parameters=dict(module._parameters),
        _buffers=dict(module._buffers),
        _non_persistent_buffers_set=set(),
        **{hook: collections.OrderedDict() for hook in HOOKS},
        _is_full_backward_hook=None,
        _modules={key: official(child) for key, child in module._modules.items() if child is not None},
    )
    for key, value in vars(module).items():
        if isinstance(value, float):
            state[key] = np.float64(value)
        elif isinstance(value, (int, str, bool)) and key[0] != "_" and key not in state:
            state[key] = value
    if name == "ImportanceRenderer":
        state["_modules"]["ray_marcher"] = _bare("MipRayMarcher2", {"training": False, "_modules": {}})
        state["plane_axes"] = torch.eye(3).expand(3, 3, 3)  # a plain attribute; a view with strides of 0
    if isinstance(module, (nn.Sequential, nn.Softplus)):
        made = type(module)()
        made.__dict__["_modules"] = state["_modules"]
        return made
    if name in BY_REFERENCE:
        return _bare(name, state)
    return Persistent(name, state | {"_init_args": (), "_init_kwargs": arguments or {}} | attributes)


def _bare(name: str, state: dict[str, Any]) -> Any:
    made = CLASSES[name]()
    made.__dict__.update(state)
    return made


def easy(value: Any) -> Any:
    """Dictionaries as EasyDict, numbers as numpy's where official files have them so."""
    if isinstance(value, dict):
        return EASY_DICT({key: easy(inner) for key, inner in value.items()})
    return np.float64(value) if isinstance(value, float) else value


def eg3d_network(G: Any, cached_planes: bool = False, neural_rendering_resolution: int | None = None) -> Persistent:
    """G as an official TriPlaneGenerator."""
    from convlora.integrations.eg3d.superresolution import MODULES

    rendering = dict(G.rendering_kwargs)
    rendering["superresolution_module"] = "training.superresolution." + rendering["superresolution_module"]
    assert G.superresolution.name in MODULES
    arguments = {k: v for k, v in G.config.items() if k not in ("rendering_kwargs", "neural_rendering_resolution")}
    # the constructor's copy is out of date, as training leaves it
    arguments |= {"rendering_kwargs": easy({**rendering, "gpc_reg_prob": 1.0, "depth_resolution": 7})}
    network = official(
        G,
        easy(arguments),
        rendering_kwargs=easy(rendering),
        neural_rendering_resolution=neural_rendering_resolution or G.neural_rendering_resolution,
        _last_planes=torch.randn(1, 3, 32, 16, 16) if cached_planes else None,
    )
    network.meta["state"]["_buffers"]["dataset_label_std"] = torch.rand(25)
    return network


def stylegan2_network(G: Any) -> Persistent:
    """G as an official Generator of the StyleGAN2-ADA code."""
    return official(G, easy(G.config))


def discriminator() -> Persistent:
    torch.manual_seed(4)
    return Persistent(
        "DualDiscriminator",
        dict(
            _parameters={"weight": nn.Parameter(torch.randn(5, 4))}, _buffers={}, _modules={}, resolution=8,
            _init_args=(), _init_kwargs={"c_dim": 25},
        ),
    )  # fmt: skip


def augment_pipe() -> Persistent:
    bank = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = dict(_parameters={}, _buffers={"p": torch.tensor(0.5)}, _modules={}, bank=bank, _init_args=())
    return Persistent("AugmentPipe", state | {"_init_kwargs": {"xflip": 1}})


def snapshot(G: Persistent, **more: Any) -> dict[str, Any]:
    """What a training run writes."""
    kwargs = EASY_DICT(class_name="training.dataset.ImageFolderDataset", path="/data/FFHQ_512.zip", use_labels=True)
    return {"training_set_kwargs": kwargs, "G": G, "D": discriminator(), "G_ema": G, "augment_pipe": None, **more}


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int, numpy_1: bool) -> None:
        super().__init__(file, protocol)
        self.numpy_1 = numpy_1

    def reducer_override(self, value: Any) -> Any:
        if self.numpy_1 and isinstance(value, np.generic):
            return NUMPY_1["scalar"], (value.dtype, value.tobytes())
        if self.numpy_1 and isinstance(value, np.ndarray):
            return NUMPY_1["_reconstruct"], (np.ndarray, (0,), b"b"), value.__reduce__()[2]
        return NotImplemented


def dumps(value: Any, protocol: int = 4, numpy_1: bool = False) -> bytes:
    """The bytes of an official pickle."""
    file = io.BytesIO()
    with standing_in(numpy_1):
        _Pickler(file, protocol, numpy_1).dump(value)
    return file.getvalue()


def write(path: Path, value: Any, protocol: int = 4, numpy_1: bool = False) -> Path:
    path.write_bytes(dumps(value, protocol, numpy_1))
    return path


@contextlib.contextmanager
def standing_in(numpy_1: bool = False) -> Iterator[None]:
    """Put the stand-ins where the pickler looks them up."""
    made: dict[str, types.ModuleType] = {}
    for value in [RECONSTRUCT, EASY_DICT, *CLASSES.values(), *(NUMPY_1.values() if numpy_1 else ())]:
        parts = value.__module__.split(".")
        for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if name not in sys.modules or name == value.__module__:
                made.setdefault(name, types.ModuleType(name))
        setattr(made[value.__module__], value.__qualname__, value)
    before = {name: sys.modules[name] for name in made if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)
