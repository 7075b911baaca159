"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning - https://arxiv.org/abs/2303.10512.

ΔW = s·P·diag(E)·Q with P `(out, r)`, E `(r)`, Q `(r, cols)`: the form of a singular value decomposition. During
training a budget shared by all layers of the adapter falls from their ranks to `target`, and the triplets (P_i, E_i,
Q_i) of least importance lose it (equations 8 to 11: smoothed sensitivity |w·∂L/∂w| times its smoothed uncertainty, the
triplet's singular value plus the means over its two vectors; equation 12: the cubic schedule). E starts at zero: the
identity.

What differs here: P and Q start orthonormal, where the paper's penalty on their being otherwise (`penalty()`, to be
added to the loss) is zero. With `relative`, s is ‖W₀‖·alpha/r, so E is the change relative to the weight; it is LoRA's
s times √(out/3), which accounts for P's columns of length 1. As in the paper, a triplet without budget has E_i = 0
after every step but keeps its vectors and gradients, so it can win budget back until the schedule ends. Allocation is
computed on the device: the host never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.methods.change import LowRankChange, check_whole
from convlora.methods.lora import scaling

SMOOTHING = 0.85  # β₁ and β₂ of the paper's experiments


class AdaLoRA(LowRankChange):
    scale: Tensor
    mask: Tensor
    steps: Tensor

    def __init__(
        self,
        w0: Tensor,
        rank: int,
        *,
        shape: tuple[int, ...] = (),
        alpha: float | None = None,
        relative: bool = True,
        target: float | None = None,
        warmup: int = 100,
        until: int = 1000,
        every: int = 10,
    ) -> None:
        """Args:
        target: rank per layer at the end, on average over the layers; None: half of `rank`.
        warmup: calls of `Adapter.step()` before the first pruning.
        until: the call at which the budget reaches the target; from then on the ranks are fixed.
        every: calls between two allocations.
        """
        super().__init__()
        for name, value, least in (("warmup", warmup, 0), ("until", until, warmup + 1), ("every", every, 1)):
            check_whole(name, value, least)
        if target is not None and not (isinstance(target, int | float) and target > 0):
            raise ConvloraError(f"target is the mean rank at the end, above 0, not {target!r}")
        self.warmup, self.until, self.every = warmup, until, every
        # A file of pruned layers comes back with lower ranks than the target it was trained to.
        self.target = min(rank, max(1, rank // 2) if target is None else target)
        (out, cols), scale = w0.shape, scaling(w0, rank, alpha, relative)
        self.register_buffer("scale", scale * math.sqrt(out / 3) if relative else scale)
        self.P = nn.Parameter(nn.init.orthogonal_(scale.new_empty(out, rank)))
        self.E = nn.Parameter(scale.new_zeros(rank))
        self.Q = nn.Parameter(nn.init.orthogonal_(scale.new_empty(rank, cols)))
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device=w0.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=w0.device))

    def factors(self, w0: Tensor) -> tuple[Tensor, Tensor]:
        return self.P * self.E, self.scale * self.Q

    def penalty(self) -> Tensor:
        """‖PᵀP − I‖² + ‖QQᵀ − I‖² (the paper's equation 4), a scalar."""
        eye = torch.eye(len(self.E), dtype=self.E.dtype, device=self.E.device)
        return (self.P.mT @ self.P - eye).square().sum() + (self.Q @ self.Q.mT - eye).square().sum()

    def importance(self) -> Tensor:
        """Take in the present gradients and give the score of each triplet, `(r)`."""
        score = torch.zeros_like(self.E)
        for name, tensor, others in (("P", self.P, 0), ("E", self.E, ()), ("Q", self.Q, 1)):
            if not hasattr(self, f"{name}_mean"):  # training only, so neither in files nor in state dicts
                self.register_buffer(f"{name}_mean", torch.zeros_like(tensor), persistent=False)
                self.register_buffer(f"{name}_spread", torch.zeros_like(tensor), persistent=False)
            mean, spread = getattr(self, f"{name}_mean"), getattr(self, f"{name}_spread")
            if tensor.grad is not None:
                sensitivity = (tensor * tensor.grad).abs()
                mean.lerp_(sensitivity, 1 - SMOOTHING)
                spread.lerp_((sensitivity - mean).abs(), 1 - SMOOTHING)
            score += (mean * spread).mean(others) if others != () else mean * spread
        return score

    @staticmethod
    def after_step(changes: Mapping[str, Any]) -> None:
        layers: list[AdaLoRA] = list(changes.values())
        if all(p.grad is None for layer in layers for p in layer.parameters()):
            raise ConvloraError(
                "AdaLoRA ranks by gradients and found none: call adapter.step() after optimizer.step() and before "
                "optimizer.zero_grad()"
            )
        with torch.no_grad():
            first, ranks = layers[0], [len(layer.E) for layer in layers]
            scores = torch.cat([layer.importance().to(first.E.device) for layer in layers])
            for layer in layers:
                layer.steps += 1
            now, warmup, until = first.steps, first.warmup, first.until
            left = 1 - ((now - warmup) / (until - warmup)).clamp(0, 1)
            end = sum(layer.target for layer in layers)
            budget = (end + (sum(ranks) - end) * left**3).round()
            places = scores.argsort(descending=True, stable=True).argsort()
            due = (now > warmup) & (now <= until) & ((now % first.every == 0) | (now == until))
            for layer, keep in zip(layers, (places < budget).split(ranks)):
                layer.mask.copy_(torch.where(due.to(layer.E.device), keep.to(layer.E.device), layer.mask))
                layer.E.mul_(layer.mask)

    def saved(self) -> tuple[dict[str, Tensor], int | None]:
        """The triplets that have budget. Once pruning has begun, a file holds its final ranks."""
        kept = self.mask.nonzero().flatten()
        if not len(kept):
            return {}, 0
        state = self.state_dict()
        if self.steps > self.warmup:
            state["steps"] = torch.full_like(self.steps, max(self.until, int(self.steps)))
        for name, dimension in (("P", 1), ("E", 0), ("Q", 0), ("mask", 0)):
            state[name] = state[name].index_select(dimension, kept)
        return state, len(kept)
