"""Projection of photos into the personal space: the point of the dilated hull that renders them best.

MyStyle (Nitzan et al., https://arxiv.org/abs/2203.17272, sections 3 and 4): latents αᵀW with Σα = 1 and α ≥ −β, so
that whatever is unknown in a photo comes out as the person. Inpainting and super-resolution are this with a mask or a
degradation inside the loss; without either it is inversion without tuning weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.batches import Kept, Watch, fit_in_batches, told
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
    seed: int = 0,
    out: str | Path | None = None,
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
        seed: of the jitter along rays.
        out: a folder for the coefficients of finished batches, `coefficients.safetensors`. A call with the same folder
            and arguments goes on where it stopped (`batch_size` may be another).

    Raises:
        ConvloraError: no photos, one anchor alone, anchors of another width than G's latents, an unknown
            parametrisation, a degradation whose result has another shape than the photos, or a loss that is not
            finite: the step and the photos are named, and finished batches stay in `out`.
        FileError: `out` holds a projection of other photos or with other arguments, which are named.
    """
    if steps < 1 or not len(photos):
        raise ConvloraError(f"project needs photos and steps ≥ 1, not {len(photos)} photos and {steps} steps")
    if parametrisation not in get_args(Parametrisation):
        raise ConvloraError(
            f"parametrisation is one of {', '.join(get_args(Parametrisation))}, not {parametrisation!r}"
        )
    check_hull(G, hull)
    device = next(G.parameters()).device
    hull = hull._replace(anchors=hull.anchors.to(device))
    rate = _LEARNING_RATES[parametrisation] if lr is None else lr

    def fit(batch: Photos, which: slice, watch: Watch) -> dict[str, Tensor]:
        theta = hull.start((len(batch),), parametrisation).requires_grad_()
        offset = torch.zeros(len(batch), G.num_ws, theta.shape[-1], device=device, requires_grad=per_layer)
        optimizer = torch.optim.Adam([theta, offset] if per_layer else [theta], lr=rate)

        def coefficients() -> Tensor:
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
            watch.see(step, each)
        return {"alpha": coefficients().detach(), "loss": each.detach()}

    kept = None
    if out is not None:
        settings = dict(
            generator=G, anchors=hull.anchors, dilation=hull.dilation, steps=steps, per_layer=per_layer,
            degrade=degrade, parametrisation=parametrisation, perceptual=perceptual,
            perceptual_weight=perceptual_weight, regularisation=regularisation, lr=rate, seed=seed,
        )  # fmt: skip
        kept = Kept(Path(out, "coefficients.safetensors"), "convlora-projection", told(settings))
    with frozen(G):
        found = fit_in_batches(
            fit, photos, steps, what="projection of", rate=f"lr={rate:g}", batch_size=batch_size, seed=seed,
            device=device, kept=kept, description=description, progress=progress,
        )  # fmt: skip
    ws = hull.w(found["alpha"].to(device))
    ws = ws if per_layer else ws[:, None].expand(-1, G.num_ws, -1)
    images = novel_views(G, ws, photos.labels[:, None], batch_size=batch_size)[:, 0]
    return Projection(found["alpha"], ws.cpu(), images, found["loss"])


def check_hull(G: TriPlaneGenerator, hull: Hull) -> None:
    """Raise `ConvloraError` unless the hull is of at least two of this generator's latents."""
    if len(hull.anchors) < 2:
        raise ConvloraError("the hull of one anchor is a point: projecting needs the anchors of at least 2 photos")
    if hull.anchors.shape[1] != G.w_dim:
        raise ConvloraError(f"the anchors are {hull.anchors.shape[1]} wide, this generator's latents {G.w_dim}")


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
