"""Select layers, build their changes, attach them: all, or nothing where any of it fails."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convlora.adapter import Adapter, check_state, register
from convlora.attach import attach, base_parameters, find_change
from convlora.errors import ConvloraError, TargetError
from convlora.fingerprint import fingerprint
from convlora.layers import as_matrix
from convlora.methods import METHODS, Change, Full
from convlora.paths import Path, forward_for
from convlora.record import Record
from convlora.targets import Patterns, resolve_ranks, select_buffers, select_layers, select_parameters

# Entries of `options` that tell how compose and extract arrived at an adapter; no option of a method.
NOTES = ("composed", "truncation", "extracted")


def inject_lora(
    model: nn.Module,
    rank: int = 1,
    alpha: float | Mapping[str, float] | None = None,
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    ranks: Mapping[str, int] | None = None,
    rank_per: Literal["matrix", "kernel"] = "matrix",
    train: Patterns = (),
    name: str = "default",
    *,
    relative: bool = True,
    path: Path = "auto",
) -> Adapter:
    """Put a LoRA adapter on `model`, in place; everything else is frozen. Returns its handle.

    The model's output stays the same, bit for bit, until the adapter is trained: `adapter.parameters()`.

    Args:
        rank: true rank of every ΔW, 1 ≤ rank ≤ min(out, cols) of each layer's im2col matrix.
        alpha: ΔW is scaled by alpha/rank; None means alpha = rank. `{glob: alpha}` sets it per layer.
        targets, exclude: a glob on dotted module names (`*` crosses dots), a compiled regular expression
            (searched), a callable `(name, module) -> bool`, or a list of these. None: every adaptable layer.
        ranks: `{glob: rank}`, first match wins; 0 leaves the layer out.
        rank_per: "matrix", or "kernel" to multiply a convolution's rank by its kernel side, as My3DGen's
            released code does (its "rank 1" has inner size 3 on a 3×3 layer).
        train: patterns of parameters, or of modules, that are trained in full and saved with the adapter.
        relative: scale ΔW by the weight's own size (see `convlora.methods.lora`); False is the textbook LoRA.
        path: "weight" computes with W₀ + ΔW, "low_rank" without ever forming a full-size weight gradient,
            "auto" chooses per layer by size.

    Raises:
        TargetError: a pattern matches nothing.
        RankError: a rank is below 1 or above a layer's limit.
        ConvloraError: the name is taken, or not usable as a module name.
    """
    return inject(
        model, "lora", rank, alpha=alpha, targets=targets, exclude=exclude, ranks=ranks, rank_per=rank_per,
        train=train, name=name, relative=relative, path=path,
    )  # fmt: skip


def inject(
    model: nn.Module,
    method: str,
    rank: int | None = None,
    *,
    alpha: float | Mapping[str, float] | None = None,
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    ranks: Mapping[str, int] | None = None,
    rank_per: Literal["matrix", "kernel"] = "matrix",
    train: Patterns = (),
    name: str = "default",
    path: Path = "auto",
    **options: Any,
) -> Adapter:
    """As `inject_lora`, for any method of `convlora.METHODS`; `options` go to the method.

    `rank=None` is the method's own choice: 1, or the largest for methods that train a whole spectrum. Two presets of
    methods count as methods: "affine_only" (the style affines in full) and "bias_only" (every bias in full).
    """
    if method == "bias_only":
        return _inject_bias_only(model, name)
    if method == "affine_only":
        method, targets = "full", "*affine" if targets is None else targets
    cls = method_class(method)
    check_name(model, name)
    if rank_per != "matrix":
        options["inner"] = None  # refused below by methods without factors
    if alpha is not None:
        options["alpha"] = None
    _check_options(method, cls, options)
    options = {key: value for key, value in options.items() if key not in ("inner", "alpha")}
    trained = select_parameters(model, train)
    tensors = {id(slot.tensor) for slot in trained.values()}
    layers = {
        layer: slot
        for layer, slot in select_layers(model, targets, exclude).items()
        if id(slot.tensor) not in tensors and not cls.skips(slot.shape, options)
    }
    resolved = resolve_ranks(
        layers,
        cls.default_rank if rank is None else rank,
        ranks,
        rank_per,
        {layer: cls.rank_limit(slot.shape, options) for layer, slot in layers.items()},
    )
    alphas = {layer: _alpha_of(layer, alpha) for layer in resolved}
    options |= {"alpha": alphas if isinstance(alpha, Mapping) else alpha, "rank_per": rank_per, "path": path}
    buffers = select_buffers(model, train)
    record = Record(name, method, resolved, options, list(trained), buffers, fingerprint(model))
    return install(model, record, *build(model, record))


def method_class(method: str) -> type[Change]:
    if method not in METHODS:
        raise ConvloraError(f"unknown method {method!r}; convlora has {', '.join(METHODS)}, affine_only, bias_only")
    return METHODS[method]


def build(model: nn.Module, record: Record) -> tuple[dict[str, Change], dict[str, Full]]:
    """The changes that a record describes, freshly initialised and not yet attached."""
    cls = method_class(record.method)
    options = {key: value for key, value in record.options.items() if key not in ("alpha", "rank_per", "path", *NOTES)}
    _check_options(record.method, cls, options)
    changes: dict[str, Change] = {}
    for layer, (rank, inner) in record.ranks.items():
        slot = record.slot(model, layer)
        own = dict(options)
        if inner != rank:
            own["inner"] = inner
        if (alpha := _alpha_of(layer, record.options.get("alpha"))) is not None:
            own["alpha"] = alpha
        w0 = as_matrix(slot.tensor.detach(), slot.owner)
        changes[layer] = cls(w0, rank, shape=slot.shape, **own)  # type: ignore[call-arg]
    trained = {name: Full(record.parameter_slot(model, name).tensor) for name in record.trained}
    return changes, trained


def _check_options(method: str, cls: type[Change], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters.values()
    known = {p.name: p.default for p in parameters if p.name not in ("w0", "rank", "shape")}
    for key in options:
        if key not in known:
            asked = 'rank_per="kernel"' if key == "inner" else f"option {key!r}"
            has = ", ".join(k for k in known if k != "inner") or "none"
            raise ConvloraError(f"method {method!r} has no {asked}; its options: {has}")
        kind = type(known[key])
        wanted: tuple[type, ...] = (int, float) if kind is float else (kind,)
        fits = isinstance(options[key], wanted) and (kind is bool or not isinstance(options[key], bool))
        if kind in (bool, int, float, str) and key not in ("inner", "alpha") and not fits:
            raise ConvloraError(f"method {method!r}: option {key} must be {kind.__name__}, not {options[key]!r}")


def _inject_bias_only(model: nn.Module, name: str) -> Adapter:
    check_name(model, name)
    trained = select_parameters(model, re.compile(r"(^|\.)bias$"))
    record = Record(name, "full", {}, {"rank_per": "matrix", "path": "weight"}, list(trained), [], fingerprint(model))
    return install(model, record, *build(model, record))


def fill(
    model: nn.Module,
    record: Record,
    changes: Mapping[str, Change],
    trained: Mapping[str, Full],
    state: Mapping[str, Tensor],
    whose: str,
) -> dict[str, Tensor]:
    """Copy tensors, keyed as in a file, into built changes; returns those of buffers, for `install`.

    Raises `FileError`, which names `whose` they are, unless keys, shapes and values are exactly the adapter's.
    """
    own = {f"{layer}/{key}": value for layer, change in changes.items() for key, value in change.state_dict().items()}
    own |= {f"train/{parameter}": full.value for parameter, full in trained.items()}
    check_state(own | {f"train/{name}": model.get_buffer(name) for name in record.buffers}, state, whose)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
    return {name: state[f"train/{name}"] for name in record.buffers}


def install(
    model: nn.Module,
    record: Record,
    changes: dict[str, Change],
    trained: dict[str, Full],
    buffers: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Attach built changes and freeze the base; a failure half-way leaves the model as it was.

    `buffers`: values for the record's buffers, which otherwise stay as they are.
    """
    if not changes and not trained:
        raise TargetError("nothing to train: every selected layer has rank 0 and train= is empty")
    path = record.options["path"]
    if path not in ("auto", "weight", "low_rank"):
        raise ConvloraError(f'path must be "auto", "weight" or "low_rank", not {path!r}')
    slots = record.slots(model)
    forwards = {
        layer: forward_for(model, layer, change, record.ranks[layer][1], slots[layer].shape, path)
        for layer, change in changes.items()
    }
    held: dict[tuple[int, str], str] = {}
    for name, slot in slots.items():
        if find_change(slot, record.name) is not None:
            raise ConvloraError(f"layer {name!r} already has a change named {record.name!r}; pass another name=")
        if (other := held.setdefault((id(slot.owner), slot.parameter), name)) != name:
            raise ConvloraError(f"{other!r} and {name!r} are the same tensor; an adapter can change it once")
    adapter = register(model, record)
    for name, strength in record.strengths.items():
        (changes.get(name) or trained[name]).strength.fill_(strength)
    for layer, change in changes.items():
        attach(slots[layer], record.name, change, forwards[layer])
    for parameter, full in trained.items():
        attach(slots[f"train/{parameter}"], record.name, full)
    for _, tensor in base_parameters(model):
        tensor.requires_grad_(False)
    with torch.no_grad():
        for name, value in (buffers or {}).items():  # after `register`, which remembers the base's values
            model.get_buffer(name).copy_(value)
    return adapter


def check_name(model: nn.Module, name: str) -> None:
    if not name.isidentifier() or name in dir(nn.ModuleDict):
        raise ConvloraError(f"an adapter's name must be a plain word (letters, digits, _), not {name!r}")
    if name in Adapter.names(model):
        raise ConvloraError(
            f"the model already has an adapter named {name!r}; pass another name=, or remove it first: "
            f"convlora.Adapter.of(model, {name!r}).remove()"
        )


def _alpha_of(layer: str, alpha: float | Mapping[str, float] | None) -> float | None:
    if isinstance(alpha, Mapping):
        return next((value for glob, value in alpha.items() if fnmatch.fnmatchcase(layer, glob)), None)
    return alpha
