"""Optimisation over photos in batches: finished ones are kept in a file, and a loss that is not finite ends the call.

Inversion, projection, inpainting and super-resolution all work so: photos are independent of each other, every batch
has random numbers of its own, and an interrupted call with the same arguments ends where an uninterrupted one does.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from convlora import files
from convlora.cpu import kept_memory
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.metrics.loading import described
from convlora.integrations.eg3d.run_folder import changes

EVERY = 10  # steps between two looks at the losses: each waits for a GPU
_SAMPLE = 64  # values of a tensor that tell one model from another


class Kept(NamedTuple):
    """A file of finished batches: `kind` is its metadata's format, `settings` (JSON) what it was made with.

    The file holds results of the first n photos, their names and digests. One without settings is taken as it is.
    """

    path: Path
    kind: str
    settings: Mapping[str, Any]

    def read(self, names: list[str], digests: list[str]) -> dict[str, Tensor]:
        """What is there for the first of the photos of these names and digests; nothing if there is no file.

        Raises:
            FileError: a damaged file, one of another kind, of other photos or other settings; each is named.
        """
        if not self.path.is_file():
            return {}
        tensors, metadata = files.read(self.path)
        if metadata.get("format") != self.kind:
            raise FileError(f"{self.path} is no {self.kind} file (metadata format={metadata.get('format')!r})")
        there, before = (_listed(self.path, metadata, key) for key in ("names", "photos"))
        if any(len(tensor) != len(there) for tensor in tensors.values()):
            raise FileError(f"{self.path} is damaged: {len(there)} names and other numbers of results; remove it")
        count = min(len(there), len(names))
        if there[:count] != names[:count]:
            raise FileError(f"{self.path} is of other photos; remove it or choose another output folder")
        changed = [name for name, old, new in zip(names, before, digests) if old != new]
        if changed:
            raise FileError(
                f"{self.path} is of other photos: pixels, mask or camera of {', '.join(changed)} are not those it was "
                "made from; remove it or choose another output folder"
            )
        check_settings(self.path, metadata, self.settings)
        return {key: tensor[:count] for key, tensor in tensors.items()}

    def write(self, names: list[str], digests: list[str], tensors: Mapping[str, Tensor]) -> None:
        """Keep the results of these photos, in place of what was there, atomically."""
        record = {"names": names, "photos": digests, "settings": dict(self.settings)}
        files.write(
            self.path, tensors, {"format": self.kind, **{key: json.dumps(value) for key, value in record.items()}}
        )


def _listed(path: Path, metadata: Mapping[str, str], key: str) -> list[str]:
    try:
        found = json.loads(metadata.get(key, "[]"))
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise FileError(f"{path} is damaged: its {key} are no list ({metadata[key][:40]}); remove it")
    return found


def check_settings(path: Path, metadata: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Raise `FileError`, naming them, if the settings recorded in a file's metadata are other ones."""
    if "settings" not in metadata:
        return
    differing = changes(json.loads(metadata["settings"]), json.loads(json.dumps(dict(settings))))
    if differing:
        raise FileError(
            f"{path} was made with other settings ({differing}); give the same to go on with it, or choose another "
            "output folder"
        )


class Watch:
    """The steps of one batch: shown on a bar, and their losses looked at every `EVERY` steps.

    The first bad step of each photo is noted on the losses' own device, so the error names it exactly although
    nothing waits for the device in between.
    """

    def __init__(self, bar: tqdm, what: str, names: Sequence[str], steps: int, rate: str, kept: str = "") -> None:
        self._bar, self._what, self._names, self._steps, self._rate = bar, what, names, steps, rate
        self._kept = kept
        self._bad: Tensor | None = None

    def see(self, step: int, each: Tensor) -> None:
        """Step `step`, counted from 0, had the losses each (N,).

        Raises:
            ConvloraError: now or in one of the steps before, a loss was not finite.
        """
        bad = ~each.detach().isfinite()
        before = torch.zeros_like(bad, dtype=torch.long) if self._bad is None else self._bad
        self._bad = torch.where(bad & (before == 0), step + 1, before)
        self._bar.update()
        if step % EVERY == 0 or step + 1 == self._steps:
            self.check()

    def check(self, **results: Tensor) -> None:
        """Raise `ConvloraError` if a loss seen so far, or a result (N, …), is not finite."""
        steps = [0] * len(self._names) if self._bad is None else self._bad.tolist()
        for result in results.values():
            fine = result.detach().flatten(1).isfinite().all(1) if result.ndim > 1 else result.isfinite()
            steps = [step or (0 if ok else self._steps) for step, ok in zip(steps, fine.tolist())]
        if any(steps):
            first = min(step for step in steps if step)
            names = [name for name, step in zip(self._names, steps) if step]
            raise diverged(self._what, names, first, self._steps, self._rate, self._kept)


def diverged(what: str, names: Sequence[str], step: int, steps: int, rate: str, kept: str = "") -> ConvloraError:
    """The error of a loss that is not finite at `step` (from 1): whose, and what can be done."""
    if step == 1:
        remedy = "its loss is not finite before anything was changed: look for NaN in the photo, its camera or weights"
    else:
        remedy = f"its loss or result is not finite: lower {rate}"
    return ConvloraError(
        f"the {what} {', '.join(names)} diverged at step {step} of {steps} ({rate}); {remedy}{kept and '; '}{kept}"
    )


def fitting(each: int, device: torch.device) -> int:
    """How many photos of `each` bytes the device's free memory holds: at least 1, at most 8 on a CPU, 64 elsewhere."""
    most = 8 if device.type == "cpu" else 64  # a CPU's cache holds no more, however large its memory
    free = free_memory(device)
    return most if free is None else max(1, min(most, free // max(1, each)))


def saved_for_backward(forward: Callable[[], object]) -> dict[int, int]:
    """Bytes of each piece of memory, by its address, that autograd saves while `forward` computes."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # keeps all of it alive, so that no address is used twice
    del output
    return found


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own to give
        return int(torch.cuda.mem_get_info(device)[0] + reserved)
    told = Path("/proc/meminfo")
    if device.type != "cpu" or not told.is_file():
        return None
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 + kept_memory() if "MemAvailable" in lines else None


def fit_in_batches(
    fit: Callable[[Photos, slice, Watch], dict[str, Tensor]],
    photos: Photos,
    steps: int,
    *,
    what: str,
    rate: str,
    batch_size: int,
    seed: int,
    device: torch.device,
    kept: Kept | None,
    description: str,
    progress: bool,
) -> dict[str, Tensor]:
    """What `fit` finds for every photo: tensors (N, …) on the CPU, of one batch after another.

    `fit(batch, which, watch)` optimises a batch, `photos.part(which)` on the device, telling each step to `watch`,
    and returns tensors whose first dimension is the batch's. Its random numbers depend on `seed` and the batch alone.

    Args:
        what, rate: for errors, e.g. "inversion of" and "lr=0.01".
        kept: where finished batches are kept; those that are there already are not made again.

    Raises:
        ConvloraError: a loss or a result that is not finite; finished batches stay in the file.
        FileError: the file is of other photos or settings.
    """
    digests = [] if kept is None else photo_digests(photos)
    found = {} if kept is None else kept.read(photos.names, digests)
    count = len(next(iter(found.values()))) if found else 0
    total, finished = (math.ceil(n / batch_size) * steps for n in (len(photos), count))
    with tqdm(total=max(total, finished), initial=finished, desc=description, disable=not progress) as bar:
        while count < len(photos):
            which = slice(count, count + batch_size)
            batch = photos.part(which).to(device)
            there = f"what was finished before is kept in {kept.path}" if kept is not None and count else ""
            watch = Watch(bar, what, batch.names, steps, rate, there)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + count)
                results = fit(batch, which, watch)
            watch.check(**results)
            for key, result in results.items():
                result = result.detach().cpu()
                found[key] = torch.cat([found[key], result]) if key in found else result
            count += len(batch)
            if kept is not None:
                kept.write(photos.names[:count], digests[:count], found)
    return found


# ------------------------------------------------------------------------------------------- what settings are told by


def told(value: Any) -> Any:
    """An argument as JSON that is the same in another process: tensors, models and functions by digest or name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {digest(value)}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {model_digest(value)}"
    if isinstance(value, functools.partial):
        return [told(value.func), told(value.args), told(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): told(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [told(item) for item in value]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return described(value) or f"{getattr(value, '__module__', '')}.{name}"


def digest(*tensors: Tensor | None) -> str:
    """Sixteen hexadecimal digits of these tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(b"none" if tensor is None else tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """A digest of names, shapes and some values of every parameter and buffer: those of its adapters too."""
    named = list(itertools.chain(model.named_parameters(), model.named_buffers()))
    sampled = [_sample(tensor.detach()) for _, tensor in named]
    shapes = ";".join(f"{name}:{tuple(tensor.shape)}" for name, tensor in named)
    values = torch.cat(sampled) if sampled else torch.empty(0)
    return hashlib.sha256(f"{shapes} {digest(values)}".encode()).hexdigest()[:16]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].double()


def photo_digests(photos: Photos) -> list[str]:
    """One digest of each photo: pixels, camera, mask."""
    masks = [None] * len(photos) if photos.masks is None else list(photos.masks)
    return [digest(*parts) for parts in zip(photos.images, photos.labels, masks)]
