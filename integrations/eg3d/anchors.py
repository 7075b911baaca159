"""Anchors: photos inverted into W, the personal space's corner points (My3DGen section 3; StyleGAN2 projector)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convlora import files
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, photo_loss, reconstruct

#: An image → w encoder as the start of inversion: (images, labels) -> (N, w_dim).
Encoder = Callable[[Tensor, Tensor], Tensor]


class Anchors(NamedTuple):
    """w (N, w_dim), the file names of the photos in the same order, and the loss each ended with (N,)."""

    w: Tensor
    names: list[str]
    loss: Tensor

    def save(self, path: str | Path, **metadata: str) -> Path:
        """One safetensors file, written atomically; the order of names is kept in it."""
        tensors = {"w": self.w, "loss": self.loss}
        return files.write(
            Path(path), tensors, {"format": "convlora-anchors", "names": json.dumps(self.names), **metadata}
        )

    @staticmethod
    def load(path: str | Path) -> Anchors:
        tensors, metadata = files.read(Path(path))
        if metadata.get("format") != "convlora-anchors":
            raise FileError(f"{path} holds no anchors (metadata format={metadata.get('format')!r})")
        return Anchors(tensors["w"], json.loads(metadata["names"]), tensors["loss"])


def find_anchors(
    G: TriPlaneGenerator,
    photos: Photos,
    steps: int = 500,
    *,
    init: str | Encoder | Tensor = "mean",
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    lr: float = 0.01,
    noise: float | None = None,
    w_samples: int = 600,
    batch_size: int = 8,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    description: str = "inverting photos",
) -> Anchors:
    """Invert every photo into W with camera and generator frozen, in batches (the loss is a sum over photos).

    The schedule is the StyleGAN2 projector's: learning rate `lr`·(½ − ½cos(π·min(1, (1−t)/0.25)))·min(1, t/0.05),
    latent noise of scale std(w)·`noise`·max(0, 1 − t/0.75)², Adam (0.9, 0.999). The loss is `photo_loss` on both
    resolutions. Noise buffers stay the generator's own: the personalised generator uses those, so fitting others
    here, as the projector does, would only let w explain less of the photo.

    Args:
        init: "mean" (of `w_samples` mapped latents), "random" (a mapped latent each), an encoder, or w (N, w_dim).
        noise: initial noise factor; None is the projector's 0.05, or 0 where the start already knows the photo.
        checkpoint: a file that keeps finished batches, so that an interrupted call with the same arguments goes on.

    Raises `ConvloraError` if the loss becomes NaN, naming the photos.
    """
    if steps < 1 or not len(photos):
        raise ConvloraError(f"find_anchors needs photos and steps ≥ 1, not {len(photos)} photos and {steps} steps")
    device = next(G.parameters()).device
    start, spread = _start(G, photos.to(device), init, w_samples, seed)
    if noise is None:
        noise = 0.05 if isinstance(init, str) else 0.0
    done, loss = torch.empty(0, G.w_dim), torch.empty(0)
    if checkpoint is not None and Path(checkpoint).is_file():
        kept = Anchors.load(checkpoint)
        if kept.names != photos.names[: len(kept.names)]:
            raise FileError(f"{checkpoint} is of other photos; remove it or choose another output folder")
        done, loss = kept.w, kept.loss
    trainable = [p for p in G.parameters() if p.requires_grad]
    total = math.ceil(len(photos) / batch_size) * steps
    bar = tqdm(total=total, initial=math.ceil(len(done) / batch_size) * steps, desc=description, disable=not progress)
    try:
        for p in trainable:
            p.requires_grad_(False)
        while len(done) < len(photos):
            batch = slice(len(done), len(done) + batch_size)
            names = photos.names[batch]
            target, labels = photos.images[batch].to(device), photos.labels[batch].to(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + batch.start)
                w = start[batch].clone().requires_grad_()
                optimizer = torch.optim.Adam([w], lr=lr)
                for step in range(steps):
                    t = (step + 1) / steps  # the projector starts at 0 and so wastes its first step
                    optimizer.param_groups[0]["lr"] = lr * _ramp(t)
                    noisy = w + torch.randn_like(w) * (spread * noise * max(0.0, 1 - t / 0.75) ** 2)
                    each = photo_loss(reconstruct(G, noisy, labels), target, perceptual, perceptual_weight)
                    optimizer.zero_grad(set_to_none=True)
                    each.sum().backward()
                    optimizer.step()
                    bar.update()
            if not bool(each.isfinite().all()):
                raise ConvloraError(
                    f"the inversion of {', '.join(names)} diverged (loss {each.tolist()}); lower lr={lr}"
                )
            done, loss = torch.cat([done, w.detach().cpu()]), torch.cat([loss, each.detach().cpu()])
            if checkpoint is not None:
                Anchors(done, photos.names[: len(done)], loss).save(checkpoint)
    finally:
        bar.close()
        for p in trainable:
            p.requires_grad_(True)
    return Anchors(done[: len(photos)], list(photos.names), loss[: len(photos)])


def w_statistics(G: TriPlaneGenerator, samples: int = 600, seed: int = 123) -> tuple[Tensor, Tensor]:
    """Mean w (w_dim,) over mapped latents, conditioned on the frontal camera, and the scalar √(Σ‖w − w̄‖²/n)."""
    w = _mapped(G, samples, seed)
    mean = w.mean(0)
    return mean, (w - mean).square().sum(1).mean().sqrt()


def _mapped(G: TriPlaneGenerator, samples: int, seed: int) -> Tensor:
    device = next(G.parameters()).device
    z = torch.randn(samples, G.z_dim, generator=torch.Generator().manual_seed(seed)).to(device)
    pivot = G.rendering_kwargs.get("avg_camera_pivot", (0.0, 0.0, 0.0))
    radius = G.rendering_kwargs.get("avg_camera_radius", cameras.RADIUS)
    with torch.no_grad():
        return G.mapping(z, cameras.frontal(samples, pivot, radius, device))[:, 0]


def _start(
    G: TriPlaneGenerator, photos: Photos, init: str | Encoder | Tensor, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    mean, spread = w_statistics(G, samples)
    if isinstance(init, Tensor):
        start = init.to(mean)
    elif callable(init):
        with torch.no_grad():
            start = init(photos.images, photos.labels).to(mean)
    elif init == "mean":
        start = mean.expand(len(photos), -1)
    elif init == "random":
        start = _mapped(G, len(photos), seed)
    else:
        raise ConvloraError(f'init must be "mean", "random", an encoder or a tensor, not {init!r}')
    if start.shape != (len(photos), G.w_dim):
        raise ConvloraError(f"init gave w of shape {tuple(start.shape)}; ({len(photos)}, {G.w_dim}) is needed")
    return start, spread


def _ramp(t: float) -> float:
    return (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.25 + 1e-3))) * min(1.0, t / 0.05)
