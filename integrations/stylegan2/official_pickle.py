"""The networks in NVIDIA's own checkpoints (StyleGAN2-ADA, EG3D), read without executing anything of the file.

Such a file is a pickle of {"G": …, "D": …, "G_ema": …}. Every network in it is a call of a function of the official
code, which compiles source text from the file, and every tensor is a call of torch's unrestricted unpickler on bytes
in the file. Here both are data: the source stays text, and the bytes are read by the same restricted machine.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from convlora.errors import FileError
from convlora.integrations.stylegan2.pickled_values import TensorView, find_value
from convlora.integrations.stylegan2.restricted import Budget, Built, Maker, Refused, load, shown

INSTRUCTIONS = 1_000_000  # a full EG3D snapshot of three networks takes 72,000
_DEEPEST = 64  # modules inside modules, lists inside lists
_MOST_MODULES, _MOST_TENSORS, _MOST_VALUES = 10_000, 100_000, 10_000
_LONGEST_NAME = 256
_SLACK = 1 << 24  # bytes: small files may repeat their tensors
_CODE = ("training.", "torch.nn.modules.", "_imported_module_")  # classes kept as a name and a state
_POSITIONAL = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")  # the first arguments of every generator
_DISCRIMINATORS = ("Discriminator", "DualDiscriminator", "SingleDiscriminator", "DummyDualDiscriminator")


class Network(NamedTuple):
    """A generator as its file describes it."""

    class_name: str  # "TriPlaneGenerator", "Generator"
    arguments: dict[str, Any]  # of its constructor; numbers, texts, lists and dictionaries only
    tensors: dict[str, Tensor]  # the state dict in the official order; plain tensors that own their memory
    attributes: dict[str, Any]  # of the network object, as it was when saved; plain values only
    classes: dict[str, str]  # {"superresolution": "SuperresolutionHybrid8XDC", …}: the class of every module
    description: str


class _Module(Built):
    """An object with attributes, of a class that was named and never looked up."""

    def __init__(self, class_name: str, state: dict[str, Any] | None = None) -> None:
        self.class_name = class_name
        self.state = {} if state is None else state

    def build(self, state: Any) -> None:
        if type(state) is not dict:
            raise Refused(f"gives a {self.class_name} a state that is a {type(state).__name__}, not a dictionary")
        self.state = state


def read_pickle(path: str | os.PathLike[str]) -> Network:
    """The generator in an official .pkl: `G_ema` if the file has it, else `G`.

    Nothing in the file is executed, imported or called, and what is not one of the few things that official files
    hold is refused by name, the bytes of every tensor included.

    Raises:
        FileError: no such file; no pickle; damaged; a name outside the allow list; a network of another family.
    """
    file = Path(path)
    if not file.is_file():
        raise FileError(f"no such file: {file}")
    size = file.stat().st_size
    try:
        with open(file, "rb") as opened:
            if reason := _no_pickle(opened.read(64)):
                raise FileError(f"{file} {reason}")
            data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from None
    budget = Budget(INSTRUCTIONS)
    try:
        root, _ = load(data, lambda name: _find(name, budget), budget)
        key, module = _generator(root)
        return _network(key, module, size + _SLACK)
    except Refused as refusal:
        raise FileError(f"{file} is a pickle that {refusal}") from None


def _no_pickle(start: bytes) -> str | None:
    """What a file evidently is instead, from its first bytes."""
    if not start:
        return "is empty: download it again"
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive, as torch.save writes it, under the name of a pickle: rename it to .pt to read it"
    if start[2:14] == b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19":
        return "is a file of torch.save, under the name of a pickle: rename it to .pt to read it"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not a checkpoint: the download went wrong"
    if start[8:9] == b"{":
        return "is a safetensors file, under the name of a pickle: rename it to .safetensors"
    return None


# ---- names ---------------------------------------------------------------------------------------------------------


def _find(name: str, budget: Budget) -> Maker:
    if name == "torch_utils.persistence._reconstruct_persistent_obj":
        return Maker(name, _persistent)
    if name.startswith("dnnlib.tflib."):
        raise Refused(
            "holds TensorFlow networks, as StyleGAN and StyleGAN2 first came. Convert it with legacy.py of NVIDIA's "
            "stylegan2-ada-pytorch, in a sandbox, since that does execute the file; then import what it writes"
        )
    if name.startswith(_CODE):
        return Maker(name, lambda arguments: _bare(name, arguments))
    if (maker := find_value(name, budget)) is not None:
        return maker
    raise Refused(f"names {name}, which no official generator needs: refused, and nothing of it was run")


def _persistent(arguments: tuple[Any, ...]) -> _Module:
    meta = arguments[0] if len(arguments) == 1 else None
    if type(meta) is not dict or meta.get("type") != "class":
        raise Refused("rebuilds a network from something that does not describe one")
    if meta.get("version") != 6:
        raise Refused(f"stores networks in version {shown(meta.get('version'))} of NVIDIA's format; 6 is the known one")
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or len(name) > _LONGEST_NAME or type(state) is not dict:
        raise Refused("rebuilds a network that has no class name, or no state")
    return _Module(name, state)


def _bare(name: str, arguments: tuple[Any, ...]) -> _Module:
    if arguments:
        raise Refused(f"calls {name} with arguments, which no official file does")
    return _Module(name.rpartition(".")[2])


# ---- the network ---------------------------------------------------------------------------------------------------


def _generator(root: Any) -> tuple[str, _Module]:
    """The key and the module of the best generator in the file."""
    if type(root) is _Module:
        return "the file", root
    if type(root) is not dict:
        raise Refused(f"holds a {type(root).__name__}, not a dictionary with a generator under 'G_ema' or 'G'")
    for key in ("G_ema", "G"):
        if type(root.get(key)) is _Module:
            return key, root[key]
    held = ", ".join(sorted(map(str, root))) or "nothing"
    only = "a discriminator and no generator" if type(root.get("D")) is _Module else "no generator"
    raise Refused(f"holds {only}: 'G_ema' or 'G' is needed, it has {held[:200]}")


def _network(key: str, module: _Module, limit: int) -> Network:
    views: dict[str, TensorView] = {}
    classes: dict[str, str] = {}
    _walk(module, "", views, classes, 0)
    if "SynthesisInput" in classes.values():
        raise Refused(
            "holds a StyleGAN3 generator, whose layers are other ones: StyleGAN2(-ADA) and EG3D are read. "
            "Its mapping and layers can be adapted in NVIDIA's own code, with convlora.inject on the loaded network"
        )
    if module.class_name in _DISCRIMINATORS:
        raise Refused(f"holds a {module.class_name} and no generator")
    if not views:
        raise Refused(f"holds a {module.class_name} without any tensor")
    if (total := sum(view.nbytes for view in views.values())) > limit:
        raise Refused(f"unfolds into {total:,} bytes of tensors, more than it holds: damaged, or a trap")
    given = module.state.get("_init_args")
    arguments = dict(zip(_POSITIONAL, given)) if type(given) is tuple else {}
    arguments |= _dictionary(module.state.get("_init_kwargs"), "_init_kwargs")
    for name, value in arguments.items():
        if not _is_plain(value):
            raise Refused(f"has an argument {name} that is no number, text, list or dictionary of these")
    attributes = {name: value for name, value in module.state.items() if name[:1] != "_" and _is_plain(value)}
    return Network(
        class_name=module.class_name,
        arguments={name: _copy(value) for name, value in arguments.items()},
        tensors={name: view.tensor() for name, view in views.items()},
        attributes={name: _copy(value) for name, value in attributes.items()},
        classes=classes,
        description=f"{module.class_name} ({key}), {len(views)} tensors",
    )


def _walk(module: Any, prefix: str, views: dict[str, TensorView], classes: dict[str, str], depth: int) -> None:
    """Tensors in the order of state_dict: parameters, buffers, then the children one after the other."""
    if type(module) is not _Module:
        raise Refused(f"has a {type(module).__name__} where the module {prefix or 'root'!r} should be")
    if depth > _DEEPEST or len(classes) > _MOST_MODULES or len(views) > _MOST_TENSORS:
        raise Refused(f"nests modules without end, near {prefix[:80]!r}")
    classes[prefix.rstrip(".")] = module.class_name
    hidden = module.state.get("_non_persistent_buffers_set") or set()
    for group in ("_parameters", "_buffers"):
        for name, view in _dictionary(module.state.get(group), prefix + group).items():
            if view is None or (group == "_buffers" and type(hidden) is set and name in hidden):
                continue
            if type(view) is not TensorView:
                raise Refused(f"has a {type(view).__name__} where the tensor {prefix + name} should be")
            views[prefix + name] = view
    for name, child in _dictionary(module.state.get("_modules"), prefix + "_modules").items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", views, classes, depth + 1)


def _dictionary(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if type(value) is not dict or len(value) > _MOST_TENSORS:
        raise Refused(f"has no dictionary of a usual size in {name}")
    if not all(type(key) is str and len(key) <= _LONGEST_NAME for key in value):
        raise Refused(f"has something other than names in {name}")
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, texts, lists and dictionaries, not too many of them."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if type(value) in (list, tuple, dict):
            # a few lists that hold each other can stand for more values than there is memory
            if seen + len(waiting) + len(value) > _MOST_VALUES or depth > _DEEPEST:
                return False
            if type(value) is dict and not all(type(key) is str for key in value):
                return False
            waiting += [(inner, depth + 1) for inner in (value.values() if type(value) is dict else value)]
        elif value is not None and type(value) not in (bool, int, float, str):
            return False
    return True


def _copy(value: Any) -> Any:
    """A copy of a plain value as JSON has it: tuples become lists."""
    if type(value) in (list, tuple):
        return [_copy(inner) for inner in value]
    return {key: _copy(inner) for key, inner in value.items()} if type(value) is dict else value
