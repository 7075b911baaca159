"""Personalisation: a low-rank adapter on a frozen EG3D, tuned on one person's anchors (My3DGen section 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import convlora
from convlora import Adapter
from convlora.errors import ConvloraError, FileError
from convlora.files import replacing
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.batches import EVERY, diverged
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, photo_loss, reconstruct
from convlora.integrations.eg3d.precision import Precision, computing_in
from convlora.integrations.eg3d.prefix import constant_prefix

Preset = Literal["true_rank", "paper", "official_code"]

#: Modulated convolutions, ToRGBs and style affines of the backbone and the super-resolution; mapping stays frozen.
TARGETS = ("backbone.synthesis.*", "superresolution.*")
_BIASES = tuple(f"{target}.{name}" for target in TARGETS for name in ("bias", "noise_strength"))
_RGB_OUTPUTS = 3
_BETTER = 0.005  # the share by which a held-out loss must fall to count as lower


def inject_personal(
    G: TriPlaneGenerator, rank: int = 1, preset: Preset = "true_rank", name: str = "default"
) -> Adapter:
    """Put the adapter of a person on G, in place; returns the handle.

    - "true_rank" (default): ΔW of true rank `rank` on every layer of `TARGETS` (capped at 3 where a ToRGB has
      only 3 outputs), scaled relative to each weight, and the decoder trained in full. 95,367 trainables on
      FFHQ-512 at rank 1.
    - "paper": what My3DGen's paper counts: rank per kernel side (its rank 1 is 3 on a 3×3 layer), biases, noise
      strengths and the decoder in full; the style affines' ΔW outside their weight gain, as its code has it.
      240,030 trainables at rank 1.
    - "official_code": what its released code trains: the same with the 4×4 constant in place of the decoder.
      243,965 at rank 1.

    ΔW is scaled by alpha/rank = 1 in all of them, at any rank.
    """
    if preset == "true_rank":
        rows = convlora.adaptable(G, list(TARGETS))
        capped = {row.name: _RGB_OUTPUTS for row in rows if row.max_rank == _RGB_OUTPUTS < rank}
        return convlora.inject_lora(G, rank, targets=list(TARGETS), ranks=capped, train=["decoder"], name=name)
    if preset not in ("paper", "official_code"):
        raise ConvloraError(f'preset must be "true_rank", "paper" or "official_code", not {preset!r}')
    whole = ["decoder"] if preset == "paper" else ["backbone.synthesis.b4.const"]
    # Their affines add ΔW·x past the layer's gain 1/√in; in raw units, where ΔW lives here, that is √in times more.
    affines = convlora.adaptable(G, [f"{target}affine" for target in TARGETS])
    alpha = {row.name: rank * math.sqrt(row.matrix[1]) for row in affines}
    return convlora.inject_lora(
        G, rank, alpha, list(TARGETS), rank_per="kernel", train=[*_BIASES, *whole], name=name, relative=False
    )


def narrow(G: nn.Module, rank: int) -> dict[str, int]:
    """`ranks=` for the layers of `TARGETS` that have fewer directions than `rank`: what they have (a ToRGB has 3)."""
    rows = convlora.adaptable(G, list(TARGETS))
    return {row.name: row.max_rank for row in rows if row.max_rank < rank}


def parameter_groups(adapter: Adapter, lr: float, lr_full: float) -> list[dict[str, Any]]:
    """Adam's groups: the low-rank factors with `lr`, the tensors trained in full with `lr_full`."""
    low_rank = [p for change in adapter.layers.values() for p in change.parameters()]
    return [{"params": low_rank, "lr": lr}, {"params": [f.value for f in adapter.trained.values()], "lr": lr_full}]


def unfreeze(G: TriPlaneGenerator) -> list[nn.Parameter]:
    """Full fine-tuning, the baseline: all of G but the mapping network. Returns its trainable parameters."""
    for name, parameter in G.named_parameters():
        parameter.requires_grad_(not name.startswith("backbone.mapping."))
    return [p for p in G.parameters() if p.requires_grad]


def personalize(
    G: TriPlaneGenerator,
    photos: Photos,
    anchors: Anchors,
    *,
    rank: int = 1,
    preset: Preset = "true_rank",
    steps: int = 500,
    batch_size: int = 4,
    lr: float = 0.002,
    lr_full: float | None = None,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Adapter:
    """Personalise G in place: `inject_personal`, then `tune` on (photo, camera, anchor) triples; returns the handle.

    options: further ones of `tune`, e.g. `patience`, `accumulate` or `precision`.
    """
    adapter = inject_personal(G, rank, preset)
    groups = parameter_groups(adapter, lr, lr if lr_full is None else lr_full)
    tune(
        G, photos, anchors, groups, steps=steps, batch_size=batch_size, perceptual=perceptual,
        perceptual_weight=perceptual_weight, checkpoint=checkpoint, seed=seed, progress=progress, **options,
    )  # fmt: skip
    return adapter


def tune(
    G: TriPlaneGenerator,
    photos: Photos,
    anchors: Anchors,
    parameters: Iterable[dict[str, Any]],
    *,
    steps: int,
    batch_size: int = 4,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 30,
    seed: int = 0,
    progress: bool = True,
    description: str = "personalising",
    accumulate: int = 1,
    checkpointing: bool = False,
    precision: Precision | None = None,
    held_out: tuple[Photos, Anchors] | None = None,
    patience: int | None = None,
    look_every: int = 50,
    look: Callable[[int], None] | None = None,
    adapter: Adapter | None = None,
) -> list[tuple[int, float]]:
    """Optimise `parameters` (Adam's groups) so that each anchor renders its photo; returns (step, loss) history.

    The loss is equation 1 on image_raw and image, over the pixels that the photos' masks allow, with the cameras
    that the anchors were refined to, if they were; Adam has betas (0, 0.992) as My3DGen's code has them, with a
    cosine decay to a tenth; gradients' NaN become 0. Blocks in front of the first tuned one run once per photo
    (`constant_prefix`). Photos come in a fresh random order every pass. Random draws
    depend on `seed` and the step alone, so a run resumed from `checkpoint` ends where an uninterrupted one does.

    Args:
        accumulate: into how many parts a batch is split, one in memory at a time; the result is the same up to
            rounding, the time that of smaller batches.
        checkpointing: keep little for backward and compute it again, which costs one forward more per step.
        precision: of forward and backward (None: as torch's flags say); weights and Adam stay in float32.
        held_out: photos that are not tuned to, with anchors of the untuned G.
        patience: stop when the loss of `held_out` at its anchors was not lowered by 0.5 % for so many looks, one
            every `look_every` steps (a multiple of 10), and take the weights of the last look that lowered it. The
            learning rate decays as if all `steps` were taken. A look costs a forward of every held-out photo, without
            randomness.
        look: called every `look_every` steps with the number of steps taken, to measure G as it is then. It must not
            change G.
        adapter: the one that `parameters` are of, where its method does something on a schedule: its `step()` is
            called after every step of the optimiser, and its buffers (PaRa's warm-up) are kept with the parameters.

    Raises:
        ConvloraError: anchors of other photos; or a loss or weight that is not finite, naming step and photos. Losses
            are looked at every tenth step. G then has the weights of the last look at which all was finite, and the
            checkpoint, written only after such a look, stays.
        FileError: the checkpoint is unreadable, or of a run with another length, learning rate or other parameters.
    """
    if anchors.names != photos.names:
        raise ConvloraError(
            "anchors and photos are not of the same files in the same order; find_anchors gives them so"
        )
    groups = [{**group, "params": list(group["params"])} for group in parameters]
    device = next(G.parameters()).device
    cameras = photos.labels if anchors.labels is None else anchors.labels
    micro = part_of(batch_size, accumulate)
    if look_every < 1 or look_every % EVERY:
        raise ConvloraError(f"look_every={look_every} must be at least {EVERY} and a multiple of {EVERY}")
    plateau = None if patience is None else _plateau(held_out, patience, device)
    images, labels, w = photos.images.to(device), cameras.to(device), anchors.w.to(device)
    masks = None if photos.masks is None else photos.masks.to(device)
    optimizer = torch.optim.Adam(groups, lr=0.002, betas=(0.0, 0.992), eps=1e-8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.55 + 0.45 * math.cos(math.pi * min(1.0, s / steps))
    )
    tuned: list[Tensor] = [p for group in groups for p in group["params"]]
    if adapter is not None:
        tuned += [buffer for change in adapter.layers.values() for buffer in change.buffers()]
    history: list[tuple[int, float]] = []
    first = 0
    if checkpoint is not None and Path(checkpoint).is_file():
        first, history = _resume(Path(checkpoint), tuned, optimizer, scheduler, steps, plateau)
    order = _order(len(photos), steps * batch_size, seed)
    with computing_in(precision, device):
        begun = constant_prefix(G, w, tuned, micro)
    saved = time.monotonic()
    recent: list[Tensor] = []  # (batch_size,) losses each, which stay on the device until a line of history is due
    good, good_step = [p.detach().clone() for p in tuned], first
    with tqdm(total=steps, initial=first, desc=description, disable=not progress) as bar:
        for step in range(first, steps):
            batch = order[step * batch_size : (step + 1) * batch_size].to(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed * 1_000_003 + step)
                samples = G.samples(len(batch))  # of the whole batch: however it is split, they are the same
            optimizer.zero_grad(set_to_none=True)
            parts: list[Tensor] = []
            for start in range(0, batch_size, micro):
                rows = batch[start : start + micro]
                with computing_in(precision, device):
                    out = reconstruct(
                        G, w[rows], labels[rows], samples=samples.part(slice(start, start + micro)),
                        begun=None if begun is None else begun.rows(rows), checkpointing=checkpointing,
                    )  # fmt: skip
                    mask = None if masks is None else masks[rows]
                    each = photo_loss(out, images[rows], perceptual, perceptual_weight, mask)
                    (each.sum() / batch_size).backward()
                parts.append(each.detach())
            for p in tuned:
                if p.grad is not None:
                    torch.nan_to_num_(p.grad, nan=0.0, posinf=1e5, neginf=-1e5)
            optimizer.step()
            if adapter is not None:
                adapter.step()
            scheduler.step()
            bar.update()
            recent.append(torch.cat(parts))
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                losses = torch.stack(recent)  # of the steps up to this one
                recent.clear()
                if not _all_finite(losses, *tuned):
                    _put(tuned, good)
                    rates = ", ".join(f"{group['initial_lr']:g}" for group in optimizer.param_groups)
                    there = f"the model has its weights of step {good_step} back"
                    if checkpoint is not None and Path(checkpoint).is_file():
                        there += f", and {checkpoint} those of its last checkpoint; remove it to begin with another lr"
                    raise _diverged(losses, order, photos.names, step + 1, steps, f"lr={rates}", there)
                _put(good, tuned)
                good_step = step + 1
                history.append((step + 1, float(losses.mean())))
                bar.set_postfix(loss=f"{history[-1][1]:.4f}")
                over, looking = step + 1 == steps, (step + 1) % look_every == 0
                if look is not None and looking:
                    look(step + 1)
                if plateau is not None and (looking or over):
                    with computing_in(precision, device):
                        loss = _held_out_loss(G, plateau, perceptual, perceptual_weight, micro)
                    over |= plateau.over(loss, tuned)
                    if over:
                        _put(tuned, plateau.best)
                if checkpoint is not None and (time.monotonic() - saved > checkpoint_seconds or over):
                    # a run that stopped early is told as finished
                    done = steps if over else step + 1
                    _save(Path(checkpoint), tuned, optimizer, scheduler, done, steps, history, plateau)
                    saved = time.monotonic()
                if over:
                    break
    return history


def part_of(batch_size: int, accumulate: int) -> int:
    """How many photos of a batch are in memory at a time. Raises ConvloraError if it has not so many parts."""
    if not 1 <= accumulate <= batch_size:
        raise ConvloraError(f"accumulate is {accumulate}; a batch of {batch_size} has 1 to {batch_size} parts")
    return math.ceil(batch_size / accumulate)


@dataclass
class _Plateau:
    """The loss of held-out photos while others are tuned to, the weights at its lowest, and how long ago that was."""

    photos: Photos
    w: Tensor
    labels: Tensor
    patience: int
    best: list[Tensor] = field(default_factory=list)
    lowest: float = math.inf
    since: int = 0

    def over(self, loss: float, tuned: list[Tensor]) -> bool:
        """Note the loss of a look; whether it was the last one worth taking."""
        if loss < self.lowest * (1 - _BETTER) or not self.best:
            self.best, self.lowest, self.since = [p.detach().clone() for p in tuned], loss, 0
        else:
            self.since += 1
        return self.since >= self.patience

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "lowest": self.lowest, "since": self.since}

    def load(self, state: Mapping[str, Any], tuned: list[Tensor]) -> None:
        self.best = [value.to(p.device) for value, p in zip(state["best"], tuned)]
        self.lowest, self.since = float(state["lowest"]), int(state["since"])


def _plateau(held_out: tuple[Photos, Anchors] | None, patience: int, device: torch.device) -> _Plateau:
    if held_out is None or not len(held_out[0]) or held_out[0].names != held_out[1].names:
        raise ConvloraError(f"patience={patience} needs held_out=(photos, anchors) of the same files in the same order")
    if patience < 1:
        raise ConvloraError(f"patience={patience} must be at least 1")
    photos, anchors = held_out[0].to(device), held_out[1]
    labels = photos.labels if anchors.labels is None else anchors.labels.to(device)
    return _Plateau(photos, anchors.w.to(device), labels, patience)


@torch.no_grad()
def _held_out_loss(
    G: TriPlaneGenerator, at: _Plateau, perceptual: Perceptual | None, weight: float, batch_size: int
) -> float:
    """The mean of `photo_loss` without randomness."""
    losses = []
    for start in range(0, len(at.photos), batch_size):
        which = slice(start, start + batch_size)
        out, photos = reconstruct(G, at.w[which], at.labels[which], deterministic=True), at.photos.part(which)
        losses.append(photo_loss(out, photos.images, perceptual, weight, photos.masks))
    return float(torch.cat(losses).mean())


def _all_finite(*tensors: Tensor) -> bool:
    """Whether all of them are; waits for their device once."""
    return bool(torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all())


@torch.no_grad()
def _put(into: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)


def _diverged(
    losses: Tensor, order: Tensor, names: list[str], step: int, steps: int, rate: str, there: str
) -> ConvloraError:
    """The error for losses (K, B) of the K steps up to `step`, of which one, or else a weight, is not finite."""
    bad = ~losses.isfinite().cpu()
    K, B = bad.shape
    row = int(bad.any(1).float().argmax()) if bool(bad.any()) else K - 1
    at = step - K + row  # from 0
    which = [i for i in range(B) if bool(bad[row, i])] or range(B)
    who = dict.fromkeys(names[int(order[at * B + i])] for i in which)
    return diverged("tuning to", list(who), at + 1, steps, rate, there)


def _order(count: int, draws: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(draws / count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])


def _save(
    path: Path,
    tuned: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    step: int,
    steps: int,
    history: list[tuple[int, float]],
    plateau: _Plateau | None,
) -> None:
    state: dict[str, Any] = {
        "tuned": [p.detach() for p in tuned], "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "step": step, "steps": steps, "history": history, "held_out": plateau and plateau.state(),
    }  # fmt: skip
    state["scheduler"].pop("lr_lambdas", None)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _resume(
    path: Path,
    tuned: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    steps: int,
    plateau: _Plateau | None,
) -> tuple[int, list[tuple[int, float]]]:
    try:
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(f"{path} is no readable checkpoint ({error}); remove it to start again") from None
    shapes = [tuple(t.shape) for t in state["tuned"]]
    rates = [
        [group["initial_lr"] for group in told["param_groups"]] for told in (state["optimizer"], optimizer.state_dict())
    ]
    watched = state.get("held_out")
    same = state["steps"] == steps and rates[0] == rates[1] and (watched is None) == (plateau is None)
    if not same or shapes != [tuple(p.shape) for p in tuned]:
        raise FileError(f"{path} is of a run with other settings; remove it or choose another output folder")
    with torch.no_grad():
        for parameter, value in zip(tuned, state["tuned"], strict=True):
            parameter.copy_(value)
    if plateau is not None and watched is not None:
        plateau.load(watched, tuned)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(optimizer.param_groups)})
    return int(state["step"]), [(int(s), float(v)) for s, v in state["history"]]
