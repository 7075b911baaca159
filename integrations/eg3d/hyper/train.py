"""Phase 1: the hypernetwork learns from what its codes draw, from the adapters that teach, and from who is seen.

Per example: `photo_loss` of the rendering, `code_weight` times the distance of codes to those of phase 0 divided by
their mean square, `identity_weight` times 1 − cosine of identities. A generator with cameras can turn a head, which
HyperDreamBooth's cannot: a share of each batch is rendered from another camera. In the lab the true picture from there
is known and compared with like a photo; of photographs it is not, and only the identity counts.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from convlora import Adapter
from convlora.errors import ConvloraError, FileError
from convlora.files import replacing
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.batches import EVERY, diverged, told
from convlora.integrations.eg3d.hyper.codes import distance, squares, start
from convlora.integrations.eg3d.hyper.examples import Examples, render, shown
from convlora.integrations.eg3d.hyper.network import HyperNetwork
from convlora.integrations.eg3d.hyper.supervise import Supervision
from convlora.integrations.eg3d.losses import Perceptual, photo_loss
from convlora.integrations.eg3d.metrics import IdentityEncoder


@dataclass(frozen=True)
class Plan:
    """How long, how fast, and what counts how much. Weights are the start that HyperDreamBooth's sketch suggests.

    distilled: so many steps come before the others, with the adapters that teach alone: they need no rendering, and
    what was learnt about a person in phase 0 is used again and again. distilled_lr: their learning rate.
    turned: share of examples that are rendered from another camera. average: of the exponential moving average that is
    kept in the end. clip: of the gradient's norm.
    """

    steps: int = 20_000
    batch_size: int = 8
    lr: float = 3e-4
    warmup: float = 0.05  # of the steps
    distilled: int = 0
    distilled_lr: float = 1e-3
    perceptual_weight: float = 1.0
    code_weight: float = 1.0
    identity_weight: float = 0.1
    turned: float = 0.5
    average: float = 0.999
    clip: float = 1.0
    seed: int = 0


def train(
    hyper: HyperNetwork,
    adapter: Adapter,
    examples: Examples,
    supervision: Supervision | None = None,
    *,
    plan: Plan = Plan(),
    perceptual: Perceptual | None = None,
    identity: IdentityEncoder | None = None,
    draw: Callable[..., dict[str, Tensor]] = render,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60,
    progress: bool = True,
    look: Callable[[HyperNetwork, int], None] | None = None,
    look_every: int = 0,
) -> list[tuple[int, dict[str, float]]]:
    """Train `hyper` in place; its weights are the moving average in the end. Returns (step, losses) every tenth step.

    `adapter` is `hyper.inject(G)`. With `supervision`, of the first of the examples, codes begin where its did
    (`HyperNetwork.calibrate`), unless the network was trained so before. A batch has different people. Random draws
    depend on the seed and the step alone, so a run resumed from `checkpoint` ends where an uninterrupted one does.

    Args:
        look: called with the moving average and the step, every `look_every` steps.

    Raises:
        ConvloraError: a loss or weight that is not finite, naming step and photos: the network then has the weights of
            the last look, every tenth step, at which all was; or there is nothing to compare with.
        FileError: the checkpoint is unreadable, or of a run with other arguments.
    """
    device = next(adapter.model.parameters()).device
    _check(examples, plan, identity, draw)
    if plan.distilled and supervision is None:
        raise ConvloraError(f"distilled={plan.distilled} steps learn from adapters that teach, and supervision is None")
    if supervision is not None and not hyper.calibrated:
        hyper.calibrate(start(hyper.layout, 1, supervision.seed), supervision.scale())
    hyper.train().requires_grad_(True).to(device)
    tuned = list(hyper.parameters())
    optimizer = torch.optim.AdamW(tuned, lr=plan.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    average = copy.deepcopy(hyper).eval().requires_grad_(False)
    settings = told(
        {**vars(plan), "examples": len(examples), "config": hyper.config, "supervised": supervision is not None}
    )
    history: list[tuple[int, dict[str, float]]] = []
    first = 0
    if checkpoint is not None and Path(checkpoint).is_file():
        first, history = _resume(Path(checkpoint), hyper, average, optimizer, settings)
    losses = _Losses(hyper, adapter, examples, supervision, plan, perceptual, identity, draw)
    good, good_step, saved = _state(hyper, average), first, time.monotonic()
    recent: list[Tensor] = []
    batches: list[Tensor] = []
    total, among = plan.distilled + plan.steps, 0 if supervision is None else len(supervision.codes.left)
    with tqdm(total=total, initial=first, desc="training the hypernetwork", disable=not progress) as bar:
        for step in range(first, total):
            alone = step < plan.distilled
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(plan.seed * 1_000_003 + step)
                generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
                index = examples.draw_people(plan.batch_size, generator, among if alone else None)
                parts = losses.codes_alone(index) if alone else losses(index, generator)
            optimizer.zero_grad(set_to_none=True)
            parts.sum(1).mean().backward()
            nn.utils.clip_grad_norm_(tuned, plan.clip)
            optimizer.param_groups[0]["lr"] = _rate(step, plan)
            optimizer.step()
            with torch.no_grad():
                share = 1 - min(plan.average, (1 + step) / (10 + step))
                for kept, now in zip(average.parameters(), tuned):
                    kept.lerp_(now, share)
            recent.append(parts.detach())
            batches.append(index)
            bar.update()
            over = step + 1 == total
            if (step + 1) % EVERY == 0 or over:
                _stop_if_not_finite(
                    hyper, average, recent, batches, examples.names, step + 1, plan, good, good_step, checkpoint
                )
                means = torch.cat(recent).mean(0).tolist()
                history.append((step + 1, dict(zip(_Losses.NAMES, means))))
                bar.set_postfix({name: f"{value:.4f}" for name, value in history[-1][1].items()})
                recent, batches = [], []
                good, good_step = _state(hyper, average), step + 1
                if checkpoint is not None and (over or time.monotonic() - saved > checkpoint_seconds):
                    _save(Path(checkpoint), good, optimizer, step + 1, history, settings)
                    saved = time.monotonic()
            if look is not None and look_every and ((step + 1) % look_every == 0 or over):
                look(average, step + 1)
    hyper.load_state_dict(average.state_dict())
    hyper.eval()
    return history


class _Losses:
    """The parts of the loss of a batch, (B, 3): pictures, codes, identity, each with its weight."""

    NAMES = ("pictures", "codes", "identity")

    def __init__(
        self, hyper: HyperNetwork, adapter: Adapter, examples: Examples, supervision: Supervision | None, plan: Plan,
        perceptual: Perceptual | None, identity: IdentityEncoder | None, draw: Callable[..., dict[str, Tensor]],
    ) -> None:  # fmt: skip
        self.hyper, self.adapter, self.examples, self.plan = hyper, adapter, examples, plan
        self.perceptual, self.identity, self.draw = perceptual, identity, draw
        self.supervision = supervision
        self.device = next(adapter.model.parameters()).device
        self.unit = 1.0 if supervision is None else float(squares(supervision.codes).sum(1).mean())

    def __call__(self, index: Tensor, generator: torch.Generator) -> Tensor:
        plan, batch = self.plan, self.examples.rows(index).to(self.device)
        photo, residual = batch.inputs()
        codes = self.hyper(photo, residual)
        turn = (torch.rand(len(index), generator=generator) < plan.turned).to(self.device)
        if self.draw is not render:
            turn = torch.zeros_like(turn)  # there are no cameras
        labels, target, masks, known = self._asked(batch, photo, turn, generator)
        out = self.draw(self.adapter, self.adapter.model, batch.w, labels, codes, self.hyper.layout)
        pictures = photo_loss(out, target, self.perceptual, plan.perceptual_weight, masks) * known
        taught = torch.zeros_like(pictures)
        if self.supervision is not None and plan.code_weight:
            there = index < len(self.supervision.codes.left)
            wanted = self.supervision.codes.rows(index.clamp(max=len(self.supervision.codes.left) - 1)).to(self.device)
            taught = distance(codes, wanted).sum(1) / self.unit * there.to(self.device)
        who = torch.zeros_like(pictures)
        if self.identity is not None and plan.identity_weight:
            with torch.no_grad():
                person = self.identity(torch.where(known.bool()[:, None, None, None], target, photo))
            who = 1 - (self.identity(out["image"]) * person).sum(1)
        return torch.stack([pictures, plan.code_weight * taught, plan.identity_weight * who], 1)

    def codes_alone(self, index: Tensor) -> Tensor:
        """The same from the adapters that teach, with weight 1, and nothing drawn."""
        assert self.supervision is not None
        batch = self.examples.rows(index).to(self.device)
        wanted = self.supervision.codes.rows(index).to(self.device)
        taught = distance(self.hyper(*batch.inputs()), wanted).sum(1) / self.unit
        return torch.stack([torch.zeros_like(taught), taught, torch.zeros_like(taught)], 1)

    def _asked(
        self, batch: Examples, photo: Tensor, turn: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Cameras, what is to be seen from there, its masks, and for whom (B,) that is known."""
        pick = turn[:, None, None, None]
        masks = None if batch.masks is None else torch.where(pick, 1.0, batch.masks.float() / 255)
        known = torch.ones(len(turn), device=self.device)
        if batch.turned is not None and batch.turned_labels is not None:
            labels = torch.where(turn[:, None], batch.turned_labels, batch.labels)
            return labels, torch.where(pick, shown(batch.turned), photo), masks, known
        G: Any = self.adapter.model
        if self.draw is render:
            seed = int(torch.randint(2**31, (), generator=generator))
            views = cameras.random_views(len(turn), seed=seed, **cameras.orbit_of(G.rendering_kwargs))
            return torch.where(turn[:, None], views.to(batch.labels), batch.labels), photo, masks, known * ~turn
        return batch.labels, photo, masks, known


def _check(
    examples: Examples, plan: Plan, identity: IdentityEncoder | None, draw: Callable[..., dict[str, Tensor]]
) -> None:
    if plan.steps < 1 or plan.batch_size < 1 or not 0 <= plan.turned <= 1:
        raise ConvloraError(
            f"steps={plan.steps} and batch_size={plan.batch_size} must be at least 1, and turned={plan.turned} a share"
        )
    if (
        draw is render
        and plan.turned == 1
        and examples.turned is None
        and (identity is None or not plan.identity_weight)
    ):
        raise ConvloraError("turned=1 without an identity encoder leaves nothing to compare photographs with")


def _rate(step: int, plan: Plan) -> float:
    """The learning rate of a step, in each part of the training: up in a line, then half a cosine to a fiftieth."""
    alone = step < plan.distilled
    t = (step + 1) / plan.distilled if alone else (step + 1 - plan.distilled) / plan.steps
    lr, warmup = plan.distilled_lr if alone else plan.lr, plan.warmup
    if t < warmup:
        return lr * t / warmup
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1e-9, 1 - warmup))))


def _state(hyper: HyperNetwork, average: HyperNetwork) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.detach().clone() for key, value in net.state_dict().items()}
        for name, net in (("hyper", hyper), ("average", average))
    }


def _stop_if_not_finite(
    hyper: HyperNetwork, average: HyperNetwork, recent: list[Tensor], batches: list[Tensor], names: list[str],
    step: int, plan: Plan, good: Mapping[str, Mapping[str, Tensor]], good_step: int, checkpoint: str | Path | None,
) -> None:  # fmt: skip
    """Waits for the device once."""
    bad = ~torch.stack([part.isfinite().all() for part in (*recent, *hyper.parameters())]).cpu()
    if not bool(bad.any()):
        return
    hyper.load_state_dict(good["hyper"])
    average.load_state_dict(good["average"])
    at = int(bad.int().argmax()) if bool(bad[: len(recent)].any()) else len(recent) - 1
    rows = ~recent[at].isfinite().all(1).cpu()
    who = [names[i] for i, wrong in zip(batches[at].tolist(), rows.tolist()) if wrong or not bool(rows.any())]
    there = f"the network has its weights of step {good_step} back"
    if checkpoint is not None and Path(checkpoint).is_file():
        there += f", and {checkpoint} those of its last checkpoint; remove it to begin with another lr"
    at_step = step - len(recent) + at + 1
    raise diverged(
        "hypernetwork on", list(dict.fromkeys(who)), at_step, plan.distilled + plan.steps, f"lr={plan.lr:g}", there
    )


def _save(
    path: Path, nets: Mapping[str, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer, step: int,
    history: list[tuple[int, dict[str, float]]], settings: Any,
) -> None:  # fmt: skip
    state = {
        "nets": {name: dict(net) for name, net in nets.items()}, "optimizer": optimizer.state_dict(), "step": step,
        "history": history, "settings": settings,
    }  # fmt: skip
    with replacing(path) as temporary:
        torch.save(state, temporary)


def _resume(
    path: Path, hyper: HyperNetwork, average: HyperNetwork, optimizer: torch.optim.Optimizer, settings: Any
) -> tuple[int, list[tuple[int, dict[str, float]]]]:
    try:
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        there, step = state["settings"], int(state["step"])
    except Exception as error:
        raise FileError(f"{path} is no readable checkpoint ({error}); remove it to start again") from None
    differing = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
    if differing:
        raise FileError(
            f"{path} is of a run with other settings ({', '.join(sorted(differing))}); remove it or choose another file"
        )
    hyper.load_state_dict(state["nets"]["hyper"])
    average.load_state_dict(state["nets"]["average"])
    optimizer.load_state_dict(state["optimizer"])
    return step, [(int(s), dict(values)) for s, values in state["history"]]
