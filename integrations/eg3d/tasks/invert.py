"""Inversion of single photos: a latent first, then weights around it (PTI, https://arxiv.org/abs/2106.05744).

My3DGen's inversion is 600 steps of W inversion and 350 of pivotal tuning per photo. Tuning everything makes 30
million numbers of each photo; a fresh low-rank adapter on the same pivot makes a file below 1 MB.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

import convlora
from convlora import Adapter
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import find_anchors
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, photo_loss, reconstruct
from convlora.integrations.eg3d.personalize import TARGETS
from convlora.integrations.eg3d.tasks.views import novel_views

#: What pivotal tuning changes: nothing, all weights as PTI does, or a fresh adapter "photo" on top of what is there.
Tuned = Literal["none", "all", "adapter"]
_PHOTO = "photo"  # the name of the adapter of one photo


class Inversion(NamedTuple):
    """Latents w (B, w_dim) and cameras labels (B, 25) of the photos; images (B, 3, R, R) from there; views
    (B, V, 3, R, R) from the cameras asked for; the loss (B,) of each photo; the file of each photo's adapter."""

    w: Tensor
    labels: Tensor
    images: Tensor
    views: Tensor
    loss: Tensor
    adapters: list[Path]


def invert(
    G: TriPlaneGenerator,
    photos: Photos,
    steps: int = 600,
    tune_steps: int = 350,
    *,
    target: Tuned = "all",
    rank: int = 1,
    lr: float = 0.01,
    lr_tune: float | None = None,
    stop_below: float | None = 0.06,
    views: Tensor | None = None,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Inversion:
    """Invert every photo, tune G on it, render, and undo the tuning: G is as it was afterwards.

    Args:
        target: what tuning changes; "none" leaves it at the latent.
        lr_tune: None: PTI's 3e-4 for all weights, 2e-3 for an adapter.
        stop_below: PTI stops once the perceptual distance of the image falls below; None: never.
        views: cameras (V, 25) to render every tuned photo from.
        out: a folder for the latents, and for `<photo>.safetensors` of target "adapter": the photo's adapter. A call
            with the same folder goes on where it stopped.
        options: further ones of `find_anchors`, e.g. `init` or `refine_camera`.

    Raises:
        ConvloraError: an unknown target, or a loss that is not finite.
    """
    if target not in get_args(Tuned):
        raise ConvloraError(f"target is one of {', '.join(get_args(Tuned))}, not {target!r}")
    folder = None if out is None else Path(out)
    pivots = find_anchors(
        G, photos, steps, lr=lr, perceptual=perceptual, perceptual_weight=perceptual_weight, seed=seed,
        checkpoint=None if folder is None else folder / "latents.safetensors", progress=progress, **options,
    )  # fmt: skip
    labels = photos.labels if pivots.labels is None else pivots.labels
    cameras = labels[:, None]
    if views is not None:
        cameras = torch.cat([cameras, views.expand(len(photos), -1, -1)], 1)
    if target == "none" or tune_steps == 0:
        pictures = novel_views(G, pivots.w, cameras)
        return Inversion(pivots.w, labels, pictures[:, 0], pictures[:, 1:], pivots.loss, [])
    model = copy.deepcopy(G)
    rate = lr_tune if lr_tune is not None else (3e-4 if target == "all" else 2e-3)
    rendered, losses, files = [], [], []
    with tqdm(total=len(photos) * tune_steps, desc="tuning to photos", disable=not progress) as bar:
        for i in range(len(photos)):
            path = None if folder is None or target == "all" else folder / f"{Path(photos.names[i]).stem}.safetensors"
            with _tunable(model, target, rank, seed + i, path) as (tuned, adapter):
                one = photos.part(slice(i, i + 1))
                finished = path is not None and path.is_file()
                loss = _tune(
                    model, one, pivots.w[i : i + 1], labels[i : i + 1], tuned, 0 if finished else tune_steps, rate,
                    perceptual, perceptual_weight, stop_below, bar,
                )  # fmt: skip
                bar.update((i + 1) * tune_steps - bar.n)
                if adapter is not None and path is not None:
                    files.append(path if finished else adapter.save(path))
                rendered.append(novel_views(model, pivots.w[i : i + 1], cameras[i : i + 1]))
                losses.append(loss)
    pictures = torch.cat(rendered)
    return Inversion(pivots.w, labels, pictures[:, 0], pictures[:, 1:], torch.stack(losses), files)


@contextlib.contextmanager
def _tunable(
    model: TriPlaneGenerator, target: Tuned, rank: int, seed: int, path: Path | None
) -> Iterator[tuple[list[nn.Parameter], Adapter | None]]:
    """What pivotal tuning trains, and the photo's adapter if that is it; the model is as before at the end."""
    if target == "adapter":
        if path is not None and path.is_file():
            adapter = convlora.load_adapter(model, path, name=_PHOTO)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                adapter = convlora.inject_lora(model, rank, targets=list(TARGETS), name=_PHOTO)
        try:
            yield list(adapter.parameters()), adapter
        finally:
            adapter.remove()
        return
    before = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(True)
        yield list(model.parameters()), None
    finally:
        for p, value, trained in before:
            p.grad = None
            p.requires_grad_(trained)
            p.detach().copy_(value)


def _tune(
    model: TriPlaneGenerator, photo: Photos, w: Tensor, label: Tensor, tuned: list[nn.Parameter], steps: int, lr: float,
    perceptual: Perceptual | None, weight: float, stop_below: float | None, bar: tqdm,
) -> Tensor:  # fmt: skip
    device = tuned[0].device
    photo, w, label = photo.to(device), w.to(device), label.to(device)
    optimizer = torch.optim.Adam(tuned, lr=lr)
    for step in range(steps):
        out = reconstruct(model, w, label)
        loss = photo_loss({"image": out["image"]}, photo.images, perceptual, weight, photo.masks)[0]
        if step % 10 == 0:  # looked at rarely: reading a number from a GPU waits for it
            if not bool(loss.isfinite()):
                raise ConvloraError(
                    f"tuning to {photo.names[0]} diverged at step {step} (loss {loss.detach().item()}); "
                    f"lower lr_tune={lr:g}"
                )
            if stop_below is not None and perceptual is not None:
                with torch.no_grad():
                    if bool(perceptual(out["image"], photo.images) < stop_below):
                        break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.update()
    with torch.no_grad():
        out = reconstruct(model, w, label, deterministic=True)
        return photo_loss({"image": out["image"]}, photo.images, perceptual, weight, photo.masks)[0].cpu()
