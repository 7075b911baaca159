"""Inversion of single photos: a latent first, then weights around it (PTI, https://arxiv.org/abs/2106.05744).

My3DGen's inversion is 600 steps of W inversion and 350 of pivotal tuning per photo. Tuning everything makes 30
million numbers of each photo; a fresh low-rank adapter on the same pivot makes a file below 1 MB.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

import convlora
from convlora import files
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.batches import EVERY, Kept, Watch, check_settings, photo_digests, told
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, photo_loss, reconstruct
from convlora.integrations.eg3d.personalize import TARGETS
from convlora.integrations.eg3d.tasks.views import Views, render_views

#: What pivotal tuning changes: nothing, all weights as PTI does, or a fresh adapter "photo" on top of what is there.
Tuned = Literal["none", "all", "adapter"]
_PHOTO = "photo"  # the name of the adapter of one photo
_LATENTS = "latents"  # the file of all photos' latents, beside those of single ones


class Inversion(NamedTuple):
    """Latents w (B, w_dim) and cameras labels (B, 25) of the photos; images (B, 3, R, R) from there; views
    (B, V, 3, R, R) and depths (B, V, 1, r, r) from the cameras asked for; the loss (B,) of each photo; the file of
    each photo's adapter."""

    w: Tensor
    labels: Tensor
    images: Tensor
    views: Tensor
    depths: Tensor
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
        out: a folder for the latents and, of every photo that was tuned to, `<photo>.safetensors`, its adapter, or
            for target "all" `<photo>.pictures.safetensors`, what was rendered. A call with the same folder and
            arguments goes on where it stopped; only the `views` of adapters may be others.
        options: further ones of `find_anchors`, e.g. `init` or `refine_camera`.

    Raises:
        ConvloraError: no photos, an unknown target, photos whose files in `out` would have one name, or a loss that
            is not finite: the step and the photos are named, G is as it was, and what was finished stays in `out`.
        FileError: `out` holds an inversion of other photos or with other arguments, which are named.
    """
    if target not in get_args(Tuned):
        raise ConvloraError(f"target is one of {', '.join(get_args(Tuned))}, not {target!r}")
    folder = None if out is None else Path(out)
    stems = [Path(name).stem for name in photos.names]
    if folder is not None and len({*stems, _LATENTS}) <= len(stems):
        raise ConvloraError(
            f"files in {folder} are named after the photos: their names must differ before the suffix, and none be "
            f"{_LATENTS}, not {', '.join(photos.names)}"
        )
    pivots = find_anchors(
        G, photos, steps, lr=lr, perceptual=perceptual, perceptual_weight=perceptual_weight, seed=seed,
        checkpoint=None if folder is None else folder / f"{_LATENTS}.safetensors", progress=progress, **options,
    )  # fmt: skip
    labels = photos.labels if pivots.labels is None else pivots.labels
    photos = replace(photos, labels=labels)
    cameras = labels[:, None]
    if views is not None:
        cameras = torch.cat([cameras, views.expand(len(photos), -1, -1)], 1)
    if target == "none" or tune_steps == 0:
        return _inversion(pivots, labels, [render_views(G, pivots.w, cameras)], pivots.loss, [])
    rate = lr_tune if lr_tune is not None else (3e-4 if target == "all" else 2e-3)
    how = _How(target, rank, tune_steps, rate, perceptual, perceptual_weight, stop_below)
    model, settings = copy.deepcopy(G), told({"generator": G, **how._asdict(), "seed": seed})
    rendered, losses, adapters = [], [], []
    with tqdm(total=len(photos) * tune_steps, desc="tuning to photos", disable=not progress) as bar:
        for i, stem in enumerate(stems):
            one = slice(i, i + 1)
            kept = None
            if folder is not None:
                kind, suffix = ("convlora", "") if target == "adapter" else ("convlora-inversion", ".pictures")
                about = {"w": told(pivots.w[i])} | ({} if target == "adapter" else {"views": told(cameras[i])})
                kept = Kept(folder / f"{stem}{suffix}.safetensors", kind, settings | about)
            tune = _tune_adapter if target == "adapter" else _tune_all
            there = "" if folder is None else f"what was finished before is kept in {folder}"
            watch = Watch(bar, "tuning to", photos.names[one], tune_steps, f"lr_tune={rate:g}", there)
            seen, loss = tune(model, photos.part(one), pivots.w[one], cameras[one], how, kept, seed + i, watch)
            bar.update((i + 1) * tune_steps - bar.n)
            rendered.append(seen)
            losses.append(loss)
            if target == "adapter" and kept is not None:
                adapters.append(kept.path)
    return _inversion(pivots, labels, rendered, torch.cat(losses), adapters)


def _inversion(pivots: Anchors, labels: Tensor, rendered: list[Views], loss: Tensor, adapters: list[Path]) -> Inversion:
    """The first of every photo's views is its own camera's."""
    images, depths = (torch.cat(parts) for parts in zip(*rendered))
    return Inversion(pivots.w, labels, images[:, 0], images[:, 1:], depths[:, 1:], loss, adapters)


class _How(NamedTuple):
    """What pivotal tuning is told, the same for every photo."""

    target: Tuned
    rank: int
    steps: int
    lr: float
    perceptual: Perceptual | None
    perceptual_weight: float
    stop_below: float | None


def _tune_all(
    model: TriPlaneGenerator, photo: Photos, w: Tensor, cameras: Tensor, how: _How, kept: Kept | None, seed: int,
    watch: Watch,
) -> tuple[Views, Tensor]:  # fmt: skip
    """The photo's views (1, V, …) and loss (1,) with all weights tuned to it; the model is as before afterwards."""
    digests = photo_digests(photo)
    found = {} if kept is None else kept.read(photo.names, digests)
    if not found:
        with _all_trained(model) as tuned:
            loss = _tune(model, photo, w, tuned, how, seed, watch)
            views = render_views(model, w, cameras)
        found = {**views._asdict(), "loss": loss}
        if kept is not None:
            kept.write(photo.names, digests, found)
    return Views(found["images"], found["depths"]), found["loss"]


def _tune_adapter(
    model: TriPlaneGenerator, photo: Photos, w: Tensor, cameras: Tensor, how: _How, kept: Kept | None, seed: int,
    watch: Watch,
) -> tuple[Views, Tensor]:  # fmt: skip
    """The same with a fresh adapter, which is kept as a file of its own; rendering it again takes no time."""
    about = {"photo": photo_digests(photo)[0], **(kept.settings if kept else {})}
    if kept is not None and kept.path.is_file():
        check_settings(kept.path, files.read(kept.path)[1], about)
        adapter = convlora.load_adapter(model, kept.path, name=_PHOTO)
        how = how._replace(steps=0)
    else:
        with _randomness(model, seed):
            adapter = convlora.inject_lora(model, how.rank, targets=list(TARGETS), name=_PHOTO)
    try:
        loss = _tune(model, photo, w, list(adapter.parameters()), how, seed, watch)
        if kept is not None and how.steps:
            adapter.save(kept.path, settings=json.dumps(about))
        return render_views(model, w, cameras), loss
    finally:
        adapter.remove()


@contextlib.contextmanager
def _all_trained(model: TriPlaneGenerator) -> Iterator[list[nn.Parameter]]:
    """Inside, every weight trains; afterwards all are as they were."""
    before = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(True)
        yield list(model.parameters())
    finally:
        for p, value, trained in before:
            p.grad = None
            p.requires_grad_(trained)
            p.detach().copy_(value)


@contextlib.contextmanager
def _randomness(model: TriPlaneGenerator, seed: int) -> Iterator[None]:
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _tune(
    model: TriPlaneGenerator, photo: Photos, w: Tensor, tuned: list[nn.Parameter], how: _How, seed: int, watch: Watch
) -> Tensor:
    """Tune to one photo; returns its loss (1,), rendered without jitter."""
    device = tuned[0].device
    photo, w = photo.to(device), w.to(device)
    optimizer = torch.optim.Adam(tuned, lr=how.lr)
    with _randomness(model, seed):
        for step in range(how.steps):
            out = reconstruct(model, w, photo.labels)
            loss = photo_loss({"image": out["image"]}, photo.images, how.perceptual, how.perceptual_weight, photo.masks)
            watch.see(step, loss)
            if step % EVERY == 0 and how.stop_below is not None and how.perceptual is not None:
                with torch.no_grad():
                    if bool(how.perceptual(out["image"], photo.images) < how.stop_below):
                        break
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
    with torch.no_grad():
        out = reconstruct(model, w, photo.labels, deterministic=True)
        loss = photo_loss({"image": out["image"]}, photo.images, how.perceptual, how.perceptual_weight, photo.masks)
    watch.check(loss=loss)
    return loss.cpu()
