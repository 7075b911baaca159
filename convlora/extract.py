"""The difference of two checkpoints as an adapter: as small as the fidelity that is asked for allows.

Each layer's difference is decomposed once. A singular value σ of it costs out + cols values in the adapter and is worth
σ²/‖W₀‖², its share of the squared relative change. Ranks are given out by worth per cost, over all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from convlora import files, lowrank
from convlora.adapter import Adapter, check_finite
from convlora.attach import base_modules, base_parameters
from convlora.errors import ConvloraError, RankError
from convlora.fingerprint import fingerprint
from convlora.inject import build, check_name, install
from convlora.layers import Slot, as_matrix, find_slot
from convlora.lowrank import SVD
from convlora.methods.change import factor_dtype
from convlora.record import Record
from convlora.targets import Patterns, select_buffers, select_layers, select_parameters

# The randomised decomposition finds a few leading directions of a large matrix; from an eighth of the full rank on,
# or on small matrices, the exact one is as fast.
_RANDOMISED_FROM = 256
_OVERSAMPLING, _ITERATIONS = 16, 4


class Spectrum(NamedTuple):
    """The difference of one layer, decomposed."""

    svd: SVD  # without the directions that are rounding
    rest: float  # Frobenius norm of what the decomposition leaves out
    weight: float  # ‖W₀‖, or ‖ΔW‖ where W₀ is zero

    @property
    def cost(self) -> int:
        """Values that one rank takes."""
        return self.svd.U.shape[0] + self.svd.V.shape[1]

    def squared(self, first: int = 0) -> float:
        """Σσ² from the given place on, with what was left out."""
        return float(self.svd.S[first:].double().square().sum()) + self.rest**2

    def error(self, rank: int) -> float:
        """‖ΔW − its best approximation of this rank‖ / ‖ΔW‖."""
        return math.sqrt(self.squared(rank) / whole) if (whole := self.squared()) else 0.0


class Component(NamedTuple):
    """One singular value."""

    layer: str
    worth: float  # σ²/‖W₀‖²
    cost: int


def extract(
    tuned: nn.Module,
    base: nn.Module,
    rank: int | None = None,
    *,
    energy: float | None = None,
    bytes: int | None = None,
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    train: Patterns = (),
    name: str = "default",
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Put on `base`, in place, a LoRA that turns it into `tuned`, a fine-tuned copy of it, as well as asked.

    Exactly one of `rank`, `energy` and `bytes` says how well. Layers that did not change get nothing, and no layer gets
    more than the rank of its difference; what is left of the rank differs from layer to layer.

    Args:
        tuned: of the same structure as `base`; it is only read.
        rank: the most that a layer gets. For ranks far below a large layer's, the decomposition is randomised (with a
            fixed seed), otherwise it is exact.
        energy: the share, 0 < energy ≤ 1, of the squared change to keep, Σ‖ΔW‖²/‖W₀‖² over the layers, with about the
            fewest values that do: greedily by worth per value.
        bytes: the largest size of the file that `adapter.save(path, dtype=dtype)` writes, header included; what fits
            is chosen as for `energy`. Text fields given to `save` come on top.
        dtype: that of the file that `bytes` is meant for; None is the adapter's own.
        targets, exclude: which layers, as in `inject_lora`.
        train: patterns of parameters or modules whose tensors are taken over in full where they changed (biases, say),
            with the buffers of modules.
        name: the adapter's.

    Returns:
        The adapter. `options["extracted"]` holds, ready for JSON: `"layers"`: {layer: ‖ΔW − result‖/‖ΔW‖}, 1 for a
        layer that got nothing; `"total"`: the same over all layers, each measured relative to its ‖W₀‖; `"left_out"`:
        {tensor: ‖difference‖/‖base's‖} of all other tensors that changed and are not in the adapter.

    Raises:
        ConvloraError: not exactly one of rank, energy, bytes; the models differ in structure, or not at all; values
            that are not finite; `tuned` has adapters that are not merged.
        RankError: `rank` is below 1, or `bytes` is not enough for the smallest adapter.
        TargetError: a pattern matches nothing.
    """
    _check_request(rank, energy, bytes)
    check_name(base, name)
    theirs = _tensors_of(tuned, base)
    full = select_parameters(base, train)
    in_full = {id(slot.tensor) for slot in full.values()}
    layers = {k: slot for k, slot in select_layers(base, targets, exclude).items() if id(slot.tensor) not in in_full}
    spectra = {}
    with torch.no_grad():
        for layer, slot in layers.items():
            other = find_slot(tuned.get_submodule(layer))
            if other is not None and _differs(slot.tensor, other.tensor):
                spectra[layer] = _spectrum(layer, slot, other.tensor, rank)
        values = {k: theirs[k] for k, slot in full.items() if _differs(slot.tensor, theirs[k])}
        buffers = {k: theirs[k] for k in select_buffers(base, train) if _differs(base.get_buffer(k), theirs[k])}
        check_finite({**values, **buffers}, "the tuned model cannot be extracted")
        covered = in_full | {id(slot.tensor) for slot in layers.values()} | {id(base.get_buffer(k)) for k in buffers}
        left_out = _left_out(base, theirs, covered)
    if not spectra and not values and not buffers:
        elsewhere = f"; {', '.join(list(left_out)[:5])} differ: name them in targets= or train=" if left_out else ""
        raise ConvloraError(f"the two models do not differ in the selected layers, so there is no adapter{elsewhere}")

    identity = fingerprint(base)

    def record_with(ranks: Mapping[str, int]) -> Record:
        options = {"alpha": None, "rank_per": "matrix", "path": "auto", "relative": False}
        pairs = {layer: (r, r) for layer, r in ranks.items() if r}
        extracted = {**_errors(spectra, ranks), "left_out": left_out}
        return Record(name, "lora", pairs, {**options, "extracted": extracted}, [*values], [*buffers], identity)

    if rank is not None:
        ranks = {layer: min(rank, len(spectrum.svd.S)) for layer, spectrum in spectra.items()}
    elif energy is not None:
        ranks = _ranks_for_energy(spectra, energy)
    else:
        assert bytes is not None

        def size(ranks: Mapping[str, int]) -> int:
            state = {f"{k}/{t}": v for k, r in ranks.items() if r for t, v in _layout(spectra[k], r).items()}
            state |= {f"train/{k}": torch.empty_like(v, device="cpu") for k, v in {**values, **buffers}.items()}
            state = {k: files.cast(torch.zeros_like(v), dtype) for k, v in state.items()}
            return len(safetensors.torch.save(state, files.metadata_of(record_with(ranks), {})))

        ranks = _ranks_for_bytes(spectra, bytes, size)
    record = record_with(ranks)
    if not any(ranks.values()) and not values and not buffers:
        raise ConvloraError("the two models differ by the rounding of their weights only, so there is no adapter")
    changes, trained = build(base, record)
    with torch.no_grad():
        for layer, change in changes.items():
            factors, _ = lowrank.truncated(spectra[layer].svd, ranks[layer])
            own = dict(change.named_parameters())
            own["A"].copy_(factors.right)
            own["B"].copy_(factors.left)
        for parameter, value in values.items():
            trained[parameter].value.copy_(value)
    return install(base, record, changes, trained, buffers)


# ---------------------------------------------------------------------------------------------- the two models


def _check_request(rank: int | None, energy: float | None, bytes: int | None) -> None:
    given = {key: value for key, value in {"rank": rank, "energy": energy, "bytes": bytes}.items() if value is not None}
    if len(given) != 1:
        raise ConvloraError(f"extract needs one of rank, energy and bytes, not {' and '.join(given) or 'none'}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise RankError(f"rank must be a whole number from 1 on, not {rank!r}")
    if energy is not None and (not isinstance(energy, int | float) or not 0 < energy <= 1):
        raise ConvloraError(f"energy is the share of the squared change to keep, 0 < energy ≤ 1, not {energy!r}")
    if bytes is not None and (isinstance(bytes, bool) or not isinstance(bytes, int) or bytes < 1):
        raise ConvloraError(f"bytes is the size of a file, a whole number from 1 on, not {bytes!r}")


def _tensors_of(tuned: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """The tuned model's parameters and saved buffers by name, checked against the base's."""
    for adapter in (Adapter.of(tuned, name) for name in Adapter.names(tuned)):
        if not adapter.merged:
            raise ConvloraError(f"the tuned model has adapter {adapter.name!r}: merge() it, or remove() it, first")
    own, theirs = dict(_tensors(base)), dict(_tensors(tuned))
    lacking, more = [k for k in own if k not in theirs], [k for k in theirs if k not in own]
    if lacking or more:
        raise ConvloraError(
            f"the two models differ in structure: only the base has {lacking[:5] or 'none'}, only the tuned one has "
            f"{more[:5] or 'none'}"
        )
    for key, tensor in own.items():
        if tensor.shape != theirs[key].shape:
            raise ConvloraError(
                f"the two models differ in structure: {key} is {list(tensor.shape)} in the base and "
                f"{list(theirs[key].shape)} in the tuned one"
            )
    return theirs


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from base_parameters(model)
    for prefix, module in base_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _differs(own: Tensor, other: Tensor) -> bool:
    return bool((own != other.to(own.device)).any())


def _left_out(base: nn.Module, theirs: Mapping[str, Tensor], covered: set[int]) -> dict[str, float]:
    found = {}
    for name, tensor in _tensors(base):
        if id(tensor) not in covered and _differs(tensor, theirs[name]):
            change, size = (theirs[name].to(tensor.device).double() - tensor.double()).norm(), tensor.double().norm()
            found[name] = _short(float(change / size) if size else 1.0)
    return found


# ---------------------------------------------------------------------------------------------------- the ranks


def _spectrum(layer: str, slot: Slot, tuned: Tensor, rank: int | None) -> Spectrum:
    w0 = as_matrix(slot.tensor.detach(), slot.owner)
    dtype = factor_dtype(w0)
    other = as_matrix(tuned.detach().to(w0.device), slot.owner).to(dtype)
    delta = other - w0.to(dtype)
    if not delta.isfinite().all():
        raise ConvloraError(f"layer {layer!r}: the difference of the two models has values that are not finite")
    least = min(delta.shape)
    if rank is not None and least >= _RANDOMISED_FROM and rank + _OVERSAMPLING <= least // 8:
        devices = [delta.device] if delta.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(delta, rank + _OVERSAMPLING, _ITERATIONS)
        found = SVD(U, S, V.mT)
        rest = float((delta - (U * S) @ V.mT).double().norm())
    else:
        found, rest = lowrank.svd(delta), 0.0
    # Zero singular values come out at about this: half of what subtracting rounded weights leaves as a random matrix,
    # and the decomposition's own rounding, measured on low-rank changes from 0.001 to 10 times the weight.
    eps = max(torch.finfo(dtype).eps, torch.finfo(factor_dtype(tuned)).eps)
    noise = 0.5 * float(other.square().mean().sqrt()) * sum(math.sqrt(side) for side in delta.shape)
    floor = eps * (noise + math.sqrt(max(delta.shape)) * float(found.S[0]))
    real = int((found.S > floor).sum())
    rest = math.hypot(rest, float(found.S[real:].double().norm()))
    size = float(w0.double().norm()) or float(delta.double().norm())
    return Spectrum(SVD(found.U[:, :real], found.S[:real], found.V[:real]), rest, size)


def _components(spectra: Mapping[str, Spectrum]) -> list[Component]:
    """All singular values, the best worth per cost first; those of one layer stay in their order."""
    found = [
        Component(layer, (sigma / spectrum.weight) ** 2, spectrum.cost)
        for layer, spectrum in spectra.items()
        for sigma in spectrum.svd.S.tolist()
    ]
    return sorted(found, key=lambda component: -component.worth / component.cost)


def _ranks_for_energy(spectra: Mapping[str, Spectrum], energy: float) -> dict[str, int]:
    ranks = dict.fromkeys(spectra, 0)
    whole = sum(spectrum.squared() / spectrum.weight**2 for spectrum in spectra.values())
    kept = 0.0
    for component in _components(spectra):
        if kept >= energy * whole:
            break
        kept += component.worth
        ranks[component.layer] += 1
    return ranks


def _ranks_for_bytes(
    spectra: Mapping[str, Spectrum], budget: int, size: Callable[[Mapping[str, int]], int]
) -> dict[str, int]:
    components = _components(spectra)

    def first(count: int) -> dict[str, int]:
        ranks = dict.fromkeys(spectra, 0)
        for component in components[:count]:
            ranks[component.layer] += 1
        return ranks

    if (least := size(first(0))) > budget:
        raise RankError(f"bytes={budget}: without any layer the file already has {least} bytes")
    low, high = 0, len(components) + 1  # size(first(low)) fits, size(first(high)) does not or is no choice
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(first(middle)) <= budget else (low, middle)
    ranks = first(low)
    # The next best one is too large; cheaper ones behind it may still fit. A layer is closed once one of its does not.
    closed: set[str] = set()
    for layer, _, _ in components[low:]:
        if layer not in closed:
            more = {**ranks, layer: ranks[layer] + 1}
            if size(more) <= budget:
                ranks = more
            else:
                closed.add(layer)
    if components and not any(ranks.values()):
        smallest = min(size({**first(0), layer: 1}) for layer in spectra if len(spectra[layer].svd.S))
        raise RankError(
            f"bytes={budget} is not enough: the smallest adapter, rank 1 on one layer, has {smallest} bytes"
        )
    return ranks


def _layout(spectrum: Spectrum, rank: int) -> dict[str, Tensor]:
    """Tensors of the sizes of a LoRA's."""
    U, S, V = spectrum.svd
    sizes = {"scale": (), "A": (rank, V.shape[1]), "B": (U.shape[0], rank)}
    return {name: torch.empty(size, dtype=S.dtype) for name, size in sizes.items()}


def _errors(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> dict[str, Any]:
    lost = math.fsum(spectrum.squared(ranks[layer]) / spectrum.weight**2 for layer, spectrum in spectra.items())
    whole = math.fsum(spectrum.squared() / spectrum.weight**2 for spectrum in spectra.values())
    layers = {layer: _short(spectrum.error(ranks[layer])) for layer, spectrum in spectra.items()}
    return {"layers": layers, "total": _short(math.sqrt(lost / whole)) if whole else 0.0}


def _short(value: float) -> float:
    return float(f"{value:.4g}")  # it goes into the file's header
