"""The loss of My3DGen, equation 1, and what it compares with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from convlora.integrations.eg3d.album import masked_resize, resize
from convlora.integrations.eg3d.generator import TriPlaneGenerator

#: A perceptual distance: images (N, 3, R, R) in [-1, 1], twice, to (N,). LPIPS' own modules fit.
Perceptual = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model gets a gradient; afterwards those that did do so again."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def reconstruct(G: TriPlaneGenerator, w: Tensor, labels: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """Render w (N, w_dim), the same for every layer, at labels (N, 25), with the checkpoint's constant noise."""
    ws = w[:, None].expand(-1, G.num_ws, -1)
    return G.synthesis(ws, labels, noise_mode="const", **kwargs)  # type: ignore[arg-type]


def preview(G: TriPlaneGenerator, w: Tensor, labels: Tensor, resolution: int) -> dict[str, Tensor]:
    """`reconstruct`'s image_raw alone, at any resolution, without super-resolution and without randomness."""
    planes = G.planes(w[:, None].expand(-1, G.num_ws, -1), noise_mode="const")
    features = G.render(planes, labels, resolution, deterministic=True).features
    return {"image_raw": features[..., :3].transpose(1, 2).unflatten(2, (resolution, resolution))}


def photo_loss(
    out: dict[str, Tensor],
    target: Tensor,
    perceptual: Perceptual | None,
    weight: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """(N,): Σ over image_raw and image of MSE + weight·perceptual; the target is resized to image_raw's side.

    `out` may hold only one of the two, as `preview`'s does.
    Padded pixels, those where mask (N, 1, R, R) is 0, do not count: the MSE is Σ m·e² / Σ m, and the perceptual
    distance is to the target `completed` by the rendering.
    """
    total = torch.zeros(len(target), device=target.device)
    for image in (out[name] for name in ("image_raw", "image") if name in out):
        if mask is None:
            truth = resize(target, image.shape[-1])
            total = total + (image - truth).square().mean((1, 2, 3))
        else:
            truth, true = masked_resize(target, mask, image.shape[-1])
            total = total + masked_mean((image - truth).square(), true)
            truth = completed(truth, true, image)
        if perceptual is not None:
            total = total + weight * perceptual(image, truth).flatten()
    return total


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(N,): the mean of values (N, C, R, R) over channels and pixels, weighted by mask (N, 1, R, R)."""
    return (values.mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def filled(images: Tensor, masks: Tensor) -> Tensor:
    """Images (N, 3, R, R) whose padded pixels have the mean colour of the true ones: for networks without a mask."""
    true = torch.where(masks > 0, images, 0)
    mean = (true * masks).sum((2, 3), keepdim=True) / masks.sum((2, 3), keepdim=True)
    return masks * true + (1 - masks) * mean


def completed(target: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    """The target with the image's own pixels where it was padded: m·target + (1 − m)·image.

    The image is not detached. A distance sees pixels in context, so a padded pixel next to the border differs in
    its features; were it a constant of the target, the gradient would move the rendering's padded pixels to make
    up for errors of true ones. Without detaching the two ways cancel (exactly so for linear features).
    """
    return torch.where(mask > 0, mask * target + (1 - mask) * image, image)
