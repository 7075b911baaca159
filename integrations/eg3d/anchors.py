"""Anchors: photos inverted into W, the personal space's corner points (My3DGen section 3; StyleGAN2 projector)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convlora import files
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.batches import Kept, Watch, fit_in_batches, fitting, saved_for_backward, told
from convlora.integrations.eg3d.camera_refinement import (
    CameraPrior,
    Refine,
    coarse_correction,
    corrected,
    moved_degrees,
)
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, filled, frozen, photo_loss, preview, reconstruct
from convlora.integrations.eg3d.renderer import Samples

#: An image → w encoder as the start of inversion: (images, labels) -> (N, w_dim).
Encoder = Callable[[Tensor, Tensor], Tensor]

_FORMAT = "convlora-anchors"
COARSE = 32  # pixels of the renderings that the coarse search for a camera compares


class Anchors(NamedTuple):
    """w (N, w_dim), the file names of the photos in the same order, and the loss each ended with (N,).

    Where cameras were refined too: their labels (N, 25), and by how many degrees each viewing direction moved (N,).
    """

    w: Tensor
    names: list[str]
    loss: Tensor
    labels: Tensor | None = None
    moved_degrees: Tensor | None = None

    def save(self, path: str | Path, **metadata: str) -> Path:
        """One safetensors file, written atomically; the order of names is kept in it."""
        tensors = {"w": self.w, "loss": self.loss}
        if self.labels is not None and self.moved_degrees is not None:
            tensors |= {"labels": self.labels, "moved_degrees": self.moved_degrees}
        return files.write(Path(path), tensors, {"format": _FORMAT, "names": json.dumps(self.names), **metadata})

    @staticmethod
    def load(path: str | Path) -> Anchors:
        tensors, metadata = files.read(Path(path))
        if metadata.get("format") != _FORMAT:
            raise FileError(f"{path} holds no anchors (metadata format={metadata.get('format')!r})")
        names = json.loads(metadata["names"])
        return Anchors(tensors["w"], names, tensors["loss"], tensors.get("labels"), tensors.get("moved_degrees"))

    def part(self, which: list[int]) -> Anchors:
        """Of some of the photos."""
        rest = (None if tensor is None else tensor[which] for tensor in (self.labels, self.moved_degrees))
        return Anchors(self.w[which], [self.names[i] for i in which], self.loss[which], *rest)

    def extended(self, more: Anchors) -> Anchors:
        """These and `more` as one."""
        both = (None if a is None or b is None else torch.cat([a, b]) for a, b in zip(self[3:], more[3:]))
        return Anchors(torch.cat([self.w, more.w]), self.names + more.names, torch.cat([self.loss, more.loss]), *both)


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
    batch_size: int | None = None,
    refine_camera: Refine | None = None,
    camera_prior: CameraPrior = CameraPrior(),  # noqa: B008 (immutable)
    camera_lr: float = 0.1,
    camera_weight: float = 1e-3,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    description: str = "inverting photos",
) -> Anchors:
    """Invert every photo into W with the generator frozen, in batches (the loss is a sum over photos).

    The schedule is the StyleGAN2 projector's: learning rate `lr`·(½ − ½cos(π·min(1, (1−t)/0.25)))·min(1, t/0.05),
    latent noise of scale std(w)·`noise`·max(0, 1 − t/0.75)², Adam (0.9, 0.999). The loss is `photo_loss` on both
    resolutions. Noise buffers stay the generator's own: the personalised generator uses those, so fitting others
    here, as the projector does, would only let w explain less of the photo. Padded pixels of photos with masks do
    not count. Every photo has random numbers of its own: its anchor is the same, up to rounding, in any batch.

    Cameras stay as they are, or are refined with w (`camera_refinement`): a coarse search over yaw and pitch, then
    gradients, with `camera_weight`·Σ(correction / standard deviation)² added to each photo's loss.

    Args:
        init: "mean" (of `w_samples` mapped latents), "random" (a mapped latent each), an encoder, or w (N, w_dim).
        noise: initial noise factor; None is the projector's 0.05, or 0 where the start already knows the photo.
        batch_size: photos at a time; None is as many as the free memory is expected to hold, up to 8 on a CPU and 64
            elsewhere: twice what one forward keeps for backward is reckoned for each (`bytes_kept`).
        refine_camera: None, "rotation" (yaw, pitch, roll) or "full" (and shift in the picture and distance).
        camera_prior: the standard deviations of the given cameras' errors, and the point about which they turn.
        camera_lr: the cameras' learning rate, standard deviations per step; it follows `lr`'s ramp, with a warm-up
            four times as long, since a camera has nothing to follow before w resembles its photo.
        checkpoint: a file that keeps finished batches, so that an interrupted call with the same arguments goes on
            (`batch_size` may be another, and photos may be added behind those that are there).

    Raises:
        ConvloraError: the loss is not finite; the step and the photos are named, and finished batches stay.
        FileError: the checkpoint is of other photos or other arguments, which are named.
    """
    if steps < 1 or not len(photos):
        raise ConvloraError(f"find_anchors needs photos and steps ≥ 1, not {len(photos)} photos and {steps} steps")
    device = next(G.parameters()).device
    sigmas = None if refine_camera is None else camera_prior.sigmas(refine_camera).to(device)
    start, spread = _start(G, photos.to(device), init, w_samples, seed)
    if noise is None:
        noise = 0.05 if isinstance(init, str) else 0.0
    how = _How(
        init, perceptual, perceptual_weight, lr, spread * noise, sigmas, camera_prior.pivot, camera_lr, camera_weight
    )
    kept = None
    if checkpoint is not None:
        _check_refinement(Path(checkpoint), refine_camera)
        settings = dict(
            generator=G, steps=steps, init=init, perceptual=perceptual, perceptual_weight=perceptual_weight, lr=lr,
            noise=noise, w_samples=w_samples, refine_camera=refine_camera, seed=seed,
        )  # fmt: skip
        if refine_camera is not None:
            settings |= dict(camera_prior=camera_prior, camera_lr=camera_lr, camera_weight=camera_weight)
        kept = Kept(Path(checkpoint), _FORMAT, told(settings))

    def fit(batch: Photos, which: slice, watch: Watch) -> dict[str, Tensor]:
        own = [torch.Generator(device).manual_seed(seed + i) for i in range(which.start, which.start + len(batch))]
        w, loss, labels = _fit(G, batch, start[which], steps, how, watch, own)
        found = {"w": w, "loss": loss}
        if sigmas is not None:
            found |= {"labels": labels, "moved_degrees": moved_degrees(batch.labels, labels)}
        return found

    with frozen(G):
        if batch_size is None:
            batch_size = 1 if len(photos) == 1 else fitting(2 * bytes_kept(G), device)
        found = fit_in_batches(
            fit, photos, steps, what="inversion of", rate=f"lr={lr:g}", batch_size=batch_size, seed=seed,
            device=device, kept=kept, description=description, progress=progress,
        )  # fmt: skip
    return Anchors(found["w"], photos.names, found["loss"], found.get("labels"), found.get("moved_degrees"))


class _How(NamedTuple):
    """What an inversion is told, the same for every batch; `sigmas` is None where cameras stay."""

    init: str | Encoder | Tensor
    perceptual: Perceptual | None
    perceptual_weight: float
    lr: float
    noise: Tensor
    sigmas: Tensor | None
    pivot: Sequence[float]
    camera_lr: float
    camera_weight: float


def _fit(
    G: TriPlaneGenerator, photos: Photos, start: Tensor, steps: int, how: _How, watch: Watch,
    generators: list[torch.Generator],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """w (N, w_dim), loss (N,) and cameras labels (N, 25) of one batch after `steps` of the schedule.

    Each photo's random numbers come from its own of the N generators.
    """
    correction, labels, sigmas = None, photos.labels, how.sigmas
    if sigmas is not None:
        start, correction = _coarse(G, photos, start, how)
    w = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=how.lr)
    if correction is not None:
        optimizer.add_param_group({"params": [correction.requires_grad_()]})
    for step in range(steps):
        t = (step + 1) / steps  # the projector starts at 0 and so wastes its first step
        optimizer.param_groups[0]["lr"] = how.lr * _ramp(t)
        if correction is not None and sigmas is not None:
            optimizer.param_groups[1]["lr"] = how.camera_lr * _ramp(t) * min(1.0, t / 0.2)
            labels = corrected(photos.labels, correction * sigmas, how.pivot)
        normal = torch.stack([torch.randn(w.shape[1:], generator=own, device=w.device) for own in generators])
        samples = Samples(*map(torch.cat, zip(*(G.samples(1, generator=own) for own in generators))))
        noisy = w + normal.to(w) * (how.noise * max(0.0, 1 - t / 0.75) ** 2)
        out = reconstruct(G, noisy, labels, samples=samples)
        each = photo_loss(out, photos.images, how.perceptual, how.perceptual_weight, photos.masks)
        loss = each.sum()
        if correction is not None:
            loss = loss + how.camera_weight * correction.square().sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        watch.see(step, each)
    if correction is not None and sigmas is not None:
        labels = corrected(photos.labels, correction.detach() * sigmas, how.pivot)
    return w.detach(), each.detach(), labels


def bytes_kept(G: TriPlaneGenerator) -> int:
    """What the rendering of one latent keeps for backward, measured with one forward; G's weights stay as they are."""
    weight = next(G.parameters())
    w = weight.new_zeros(1, G.w_dim).requires_grad_()
    front = cameras.frontal(1, **cameras.orbit_of(G.rendering_kwargs), device=weight.device)
    with torch.enable_grad():
        return sum(saved_for_backward(lambda: reconstruct(G, w, front, deterministic=True)).values())


def _check_refinement(checkpoint: Path, refine: Refine | None) -> None:
    """An interrupted call's anchors have cameras of their own if, and only if, this call's will."""
    if checkpoint.is_file() and (Anchors.load(checkpoint).labels is None) != (refine is None):
        had = "with" if refine is None else "without"
        raise FileError(f"{checkpoint} was made {had} camera refinement; remove it or choose another output folder")


def _coarse(G: TriPlaneGenerator, photos: Photos, start: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    """Where w (N, w_dim) and the cameras' correction (N, K), in units of sigmas, of one batch begin."""
    assert how.sigmas is not None

    def begin(labels: Tensor) -> Tensor:
        # an encoder that takes the camera into account sees another head from another camera
        return how.init(_seen(photos), labels).to(start) if callable(how.init) else start

    def score(labels: Tensor) -> Tensor:
        out = preview(G, begin(labels), labels, COARSE)
        return photo_loss(out, photos.images, how.perceptual, how.perceptual_weight, photos.masks)

    correction = coarse_correction(score, photos.labels, how.sigmas, how.camera_weight, how.pivot)
    with torch.no_grad():
        return begin(corrected(photos.labels, correction * how.sigmas, how.pivot)), correction


def _seen(photos: Photos) -> Tensor:
    """The images as an encoder, which knows no masks, should see them."""
    return photos.images if photos.masks is None else filled(photos.images, photos.masks)


def w_statistics(G: TriPlaneGenerator, samples: int = 600, seed: int = 123) -> tuple[Tensor, Tensor]:
    """Mean w (w_dim,) over mapped latents, conditioned on the frontal camera, and the scalar √(Σ‖w − w̄‖²/n)."""
    w = _mapped(G, samples, seed)
    mean = w.mean(0)
    return mean, (w - mean).square().sum(1).mean().sqrt()


def _mapped(G: TriPlaneGenerator, samples: int, seed: int) -> Tensor:
    device = next(G.parameters()).device
    z = torch.randn(samples, G.z_dim, generator=torch.Generator().manual_seed(seed)).to(device)
    frontal = cameras.frontal(samples, **cameras.orbit_of(G.rendering_kwargs), device=device)
    with torch.no_grad():
        return G.mapping(z, frontal)[:, 0]


def _start(
    G: TriPlaneGenerator, photos: Photos, init: str | Encoder | Tensor, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    mean, spread = w_statistics(G, samples)
    if isinstance(init, Tensor):
        start = init.to(mean)
    elif callable(init):
        with torch.no_grad():
            start = init(_seen(photos), photos.labels).to(mean)
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
