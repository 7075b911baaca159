"""MODEL on the command line: "lab", "lab-cats", a generator's file, or a function of one's own that makes the model.

Imported by verbs only, since it imports torch.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from convlora import files
from convlora.errors import ConvloraError, FileError

_FUNCTION = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_][\w.]*)(@(?P<weights>.+))?")

Writer = Callable[[Path, "torch.dtype | None", Mapping[str, str]], Path]


class Loaded(NamedTuple):
    model: nn.Module  # in eval mode, on the CPU
    write: Writer  # saves the model as it then is, in the way it was stored: `(path, dtype, metadata)`


def load_model(spec: str) -> Loaded:
    """The model that MODEL means.

    "lab", "lab-cats", the .safetensors of an EG3D or StyleGAN2 generator (or its folder), or `module:function`,
    imported from the current folder or the environment and called without arguments, `@weights.safetensors` loaded into
    what it returns.

    Raises `ConvloraError` if it is none of these, or fails; `FileError` if a file does.
    """
    named = _FUNCTION.fullmatch(spec)
    if named:
        return _from_function(spec, **named.groupdict())
    if spec not in ("lab", "lab-cats") and not Path(spec).exists():
        raise ConvloraError(
            f"no model {spec!r}: MODEL is lab, lab-cats, the .safetensors file of a generator, or module:function that "
            "returns an nn.Module, optionally module:function@weights.safetensors"
        )
    return _from_checkpoint(spec)


def _from_checkpoint(spec: str) -> Loaded:
    from convlora.integrations import eg3d, stylegan2
    from convlora.integrations.eg3d.checkpoint import SHIPPED
    from convlora.integrations.stylegan2.checkpoint import read_checkpoint

    path = SHIPPED.get(spec, Path(spec))
    if path.is_file() and path.suffix == ".safetensors":
        _, told = files.read(path)
        if told.get("format") == "convlora":
            raise FileError(f"{path} is an adapter; MODEL is the model that it belongs to")
    else:
        told = {}
    config, _ = read_checkpoint(path)
    family: Any = eg3d.checkpoint if "rendering_kwargs" in config else stylegan2.checkpoint
    model = family.load_generator(path)
    kept = {key: value for key, value in told.items() if key != "config"}
    return Loaded(model, lambda out, dtype, metadata: family.save_generator(model, out, {**kept, **metadata}, dtype))


def _from_function(spec: str, module: str, function: str, weights: str | None) -> Loaded:
    try:
        sys.path.insert(0, "")  # `python -m` has the current folder there, an installed program has not
        try:
            make: Any = importlib.import_module(module)
        finally:
            sys.path.remove("")
        for part in function.split("."):
            make = getattr(make, part)
        model = make() if callable(make) and not isinstance(make, nn.Module) else make
    except ConvloraError:
        raise
    except Exception as error:  # the user's own code may raise anything; the cause is kept
        raise ConvloraError(f"{spec}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConvloraError(f"{spec}: {function} gave {type(model).__name__}, not an nn.Module")
    if weights is not None:
        tensors, _ = files.read(Path(weights))
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())  # torch's message has lines and tabs
            raise FileError(f"{weights} does not fit {spec.partition('@')[0]}: {reason}") from error

    def write(out: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        # clones: safetensors refuses tensors that share memory (tied weights)
        state = {key: files.cast(value, dtype).clone() for key, value in model.state_dict().items()}
        return files.write(out, state, {"format": "pt", **metadata})

    return Loaded(model.eval(), write)
