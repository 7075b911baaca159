"""Directions of an attribute in W: the normal of the plane that parts latents with much of it from those with little.

InterFaceGAN (Shen et al., https://arxiv.org/abs/1907.10786, sections 2.2 and 2.3), with its constants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora import files
from convlora.errors import ConvloraError, FileError

Fit = Literal["svm", "logistic"]
_FORMAT = "convlora-direction"


class Direction(NamedTuple):
    """A unit normal (w_dim,), the attribute it stands for, and how well its plane parts latents it was not fitted on.

    `accuracy` is that on the validation part of the extremes, `accuracy_rest` that on everything in between, parted
    at the middle of the scores' range.
    """

    normal: Tensor
    attribute: str
    accuracy: float
    accuracy_rest: float

    def save(self, path: str | Path) -> Path:
        """One safetensors file, written atomically."""
        told = {"format": _FORMAT, "attribute": self.attribute}
        told |= {"accuracy": repr(self.accuracy), "accuracy_rest": repr(self.accuracy_rest)}
        return files.write(path, {"normal": self.normal}, told)

    @staticmethod
    def load(path: str | Path) -> Direction:
        tensors, told = files.read(Path(path))
        if told.get("format") != _FORMAT or "normal" not in tensors:
            raise FileError(f"{path} holds no direction (metadata format={told.get('format')!r})")
        return Direction(tensors["normal"], told["attribute"], float(told["accuracy"]), float(told["accuracy_rest"]))


def find_direction(
    w: Tensor,
    scores: Tensor,
    attribute: str,
    *,
    share: float = 0.02,
    validation: float = 0.3,
    fit: Fit = "svm",
    C: float = 1.0,
    seed: int = 0,
) -> Direction:
    """The direction in which `scores` (M,) of latents w (M, w_dim) rise.

    The highest and the lowest `share` of the scores are parted by a linear classifier with regularisation C; the
    rest only measures it. InterFaceGAN takes 0.02 of half a million; a tenth suits some thousand personal latents.

    Args:
        validation: the part of the extremes that is kept from the fit.
        fit: "svm", with the squared hinge, or "logistic"; both convex.

    Raises:
        ConvloraError: scores that are all equal, not finite, or of another number than w; too few latents.
    """
    scores, w = scores.flatten().double().cpu(), w.double().cpu()
    if w.ndim != 2 or len(w) != len(scores):
        raise ConvloraError(f"find_direction needs w (M, w_dim) and M scores, got {tuple(w.shape)} and {len(scores)}")
    if not bool(scores.isfinite().all()):
        wrong = int((~scores.isfinite()).sum())
        raise ConvloraError(f"{wrong} of {len(scores)} scores of {attribute!r} are not finite")
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        raise ConvloraError(
            f"all {len(scores)} scores of {attribute!r} are {low:g}: nothing tells latents apart; use other latents "
            "or another predictor"
        )
    if not (0 < share <= 0.5 and 0 < validation < 1 and C > 0):
        raise ConvloraError(f"share={share} must lie in (0, 0.5], validation={validation} in (0, 1), C={C} above 0")
    count = int(share * len(scores))
    train = count - int(validation * count)
    if train < 2 or train == count:
        raise ConvloraError(
            f"{share:g} of {len(scores)} latents are {count} a side; at least 3 are needed: more latents, larger share"
        )
    order = scores.argsort()
    generator = torch.Generator().manual_seed(seed)
    lowest = order[:count][torch.randperm(count, generator=generator)]
    highest = order[-count:][torch.randperm(count, generator=generator)]
    center, spread = w.mean(0), w.std().clamp_min(1e-12)
    x = (w - center) / spread
    target = torch.cat([-torch.ones(train), torch.ones(train)]).to(x)
    normal, bias = _separate(x[torch.cat([lowest[:train], highest[:train]])], target, fit, C)

    def accuracy(rows: Tensor, sign: Tensor) -> float:
        return float(((x[rows] @ normal + bias) * sign > 0).double().mean()) if len(rows) else float("nan")

    held = torch.cat([lowest[train:], highest[train:]])
    held_sign = torch.cat([-torch.ones(count - train), torch.ones(count - train)]).to(x)
    rest = order[count:-count]
    rest_sign = torch.where(scores[rest] > (low + high) / 2, 1.0, -1.0).to(x)
    unit = F.normalize(normal, dim=0).float()
    return Direction(unit, attribute, accuracy(held, held_sign), accuracy(rest, rest_sign))


def without(direction: Tensor, *others: Tensor) -> Tensor:
    """A conditional direction: unit `direction` (w_dim,) with its parts along the span of `others` taken out.

    Raises:
        ConvloraError: it lies in their span, so nothing is left.
    """
    basis, _ = torch.linalg.qr(torch.stack([other.double() for other in others], 1))
    left = direction.double() - basis @ (basis.T @ direction.double())
    if float(left.norm()) < 1e-6 * float(direction.norm()):
        raise ConvloraError("the direction lies in the span of those it should be independent of")
    return F.normalize(left, dim=0).to(direction)


def _separate(x: Tensor, sign: Tensor, fit: Fit, C: float) -> tuple[Tensor, Tensor]:
    """Weights and bias that minimise ½‖n‖² + C·Σ loss(sign·(x·n + b))."""
    if fit not in ("svm", "logistic"):
        raise ConvloraError(f'fit is "svm" or "logistic", not {fit!r}')
    normal = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([normal, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        margin = sign * (x @ normal + bias)
        each = (1 - margin).clamp_min(0).square() if fit == "svm" else F.softplus(-margin)
        total = normal.square().sum() / 2 + C * each.sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    return normal.detach(), bias.detach()
