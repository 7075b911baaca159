"""Projection of photos into the personal space: the point of the dilated hull that renders them best.

MyStyle (Nitzan et al., https://arxiv.org/abs/2203.17272, sections 3 and 4): latents αᵀW with Σα = 1 and α ≥ −β, so
that whatever is unknown in a photo comes out as the person. Inpainting and super-resolution are this with a mask or a
degradation inside the loss; without either it is inversion without tuning weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, frozen, photo_loss
from convlora.integrations.eg3d.tasks.hull import Hull, Parametrisation
from convlora.integrations.eg3d.tasks.views import novel_views

#: What a photo went through before it came to us: images (N, 3, R, R) to (N, 3, r, r), differentiable.
Degradation = Callable[[Tensor], Tensor]
_LEARNING_RATES = {"exact": 0.1, "mystyle": 0.005}  # of θ: a softmax of 50 moves α by about a 25th of θ
_HELD_LAYERS = 12 / 18  # of the latents, from the first, whose offsets MyStyle holds back


class Projection(NamedTuple):
    """Coefficients alpha (B, N), or (B, num_ws, N) of α⁺; latents ws (B, num_ws, w_dim); their images (B, 3, R, R)
    from the photos' cameras; the loss (B,) each ended with."""

    alpha: Tensor
    ws: Tensor
    images: Tensor
    loss: Tensor


def project(
    G: TriPlaneGenerator,
    photos: Photos,
    hull: Hull,
    steps: int = 300,
    *,
    per_layer: bool = False,
    degrade: Degradation | None = None,
    parametrisation: Parametrisation = "exact",
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    regularisation: float = 10.0,
    lr: float | None = None,
    batch_size: int = 8,
    progress: bool = True,
    description: str = "projecting",
) -> Projection:
    """Optimise coefficients so that G renders the photos; G stays as it is, photos are independent of each other.

    Args:
        photos: pixels where their masks are 0 do not count. With `degrade`, images are what it makes of full-size
            ones, of any size, and have no masks.
        per_layer: α⁺, coefficients of their own for every latent of the synthesis network, the first two thirds held
            near the common ones by `regularisation`·‖α_l − α‖.
        degrade: compares degrade(image) with the photos, and leaves image_raw out.
        lr: of Adam, with a cosine ramp-down over the last quarter; None: 0.1, or MyStyle's 0.005 with its
            parametrisation.

    Raises:
        ConvloraError: anchors of another width than G's latents, a degradation whose result has another shape than
            the photos, or a loss that is not finite (the step is named).
    """
    if steps < 1 or not len(photos):
        raise ConvloraError(f"project needs photos and steps ≥ 1, not {len(photos)} photos and {steps} steps")
    if hull.anchors.shape[1] != G.w_dim:
        raise ConvloraError(f"the anchors are {hull.anchors.shape[1]} wide, this generator's latents {G.w_dim}")
    device = next(G.parameters()).device
    hull = hull._replace(anchors=hull.anchors.to(device))
    rate = _LEARNING_RATES.get(parametrisation, 0.1) if lr is None else lr
    found: list[tuple[Tensor, Tensor]] = []
    starts = range(0, len(photos), batch_size)
    with frozen(G), tqdm(total=len(starts) * steps, desc=description, disable=not progress) as bar:
        for first in starts:
            batch = photos.part(slice(first, first + batch_size)).to(device)
            theta = hull.start((len(batch),), parametrisation).requires_grad_()
            offset = torch.zeros(len(batch), G.num_ws, theta.shape[-1], device=device, requires_grad=per_layer)
            optimizer = torch.optim.Adam([theta, offset] if per_layer else [theta], lr=rate)

            def coefficients(theta: Tensor = theta, offset: Tensor = offset) -> Tensor:
                return hull.coefficients(theta[:, None] + offset if per_layer else theta, parametrisation)

            for step in range(steps):
                left = min(1.0, 4 * (1 - step / steps))
                optimizer.param_groups[0]["lr"] = rate * (0.5 - 0.5 * math.cos(math.pi * left))
                alpha = coefficients()
                each = _loss(G, hull.w(alpha), batch, degrade, perceptual, perceptual_weight)
                total = each.sum()
                if per_layer and regularisation:
                    total = total + regularisation * _held_back(alpha, hull.coefficients(theta, parametrisation))
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                optimizer.step()
                bar.update()
            if not bool(each.isfinite().all()):
                raise ConvloraError(
                    f"projecting {', '.join(batch.names)} diverged by step {steps} (loss {each.tolist()}); "
                    f"lower lr={rate:g}"
                )
            found.append((coefficients().detach(), each.detach().cpu()))
    alpha = torch.cat([a for a, _ in found])
    ws = hull.w(alpha)
    ws = ws if per_layer else ws[:, None].expand(-1, G.num_ws, -1)
    images = novel_views(G, ws, photos.labels[:, None], batch_size=batch_size)[:, 0]
    return Projection(alpha.cpu(), ws.cpu(), images, torch.cat([loss for _, loss in found]))


def _loss(
    G: TriPlaneGenerator, w: Tensor, photos: Photos, degrade: Degradation | None, perceptual: Perceptual | None,
    weight: float,
) -> Tensor:  # fmt: skip
    ws = w if w.ndim == 3 else w[:, None].expand(-1, G.num_ws, -1)
    out = G.synthesis(ws, photos.labels, noise_mode="const")
    if degrade is None:
        return photo_loss(out, photos.images, perceptual, weight, photos.masks)
    image = degrade(out["image"])
    if image.shape != photos.images.shape:
        raise ConvloraError(
            f"the degradation makes {tuple(image.shape[1:])} of a picture, "
            f"the photos are {tuple(photos.images.shape[1:])}"
        )
    return photo_loss({"image": image}, photos.images, perceptual, weight)


def _held_back(alpha: Tensor, common: Tensor) -> Tensor:
    held = alpha[:, : round(_HELD_LAYERS * alpha.shape[1])] - common[:, None]
    return (held.square().sum(-1) + 1e-12).sqrt().mean(1).sum()
