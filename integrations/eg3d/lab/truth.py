"""What only a world that was drawn can tell: the true picture, depth and attribute of a person from any camera."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.lab import world
from convlora.integrations.eg3d.lab._species import Species
from convlora.integrations.eg3d.lab._species import species as species_of


class Truth(NamedTuple):
    """images (N, V, 3, R, R) in [-1, 1]; depths and masks of the head (N, V, 1, r, r) at the renderer's resolution."""

    images: Tensor
    depths: Tensor
    masks: Tensor


def true_views(
    params: Tensor, traits: Tensor, labels: Tensor, resolution: int, depth_resolution: int,
    species: str | Species = "people",
) -> Truth:  # fmt: skip
    """N photographed moments, params (N, PARAM_DIM) and traits (N, TRAIT_DIM), from cameras labels (V, 25)."""
    count, views = len(params), len(labels)
    poses, _ = cameras.split_label(labels.repeat(count, 1))
    rows = params.repeat_interleave(views, 0), traits.repeat_interleave(views, 0)
    image = world.render(*rows, poses, None, resolution, species=species).image
    coarse = world.render(*rows, poses, None, depth_resolution, supersample=1, species=species)
    return Truth(*(plane.unflatten(0, (count, views)) for plane in (image, coarse.depth, coarse.mask)))


def depth_error(depths: Tensor, truth: Truth) -> Tensor:
    """(N, V): mean |depth − true depth| over the head in world units, the camera's distance being 2.7.

    The head's rim is left out: there a pixel sees both the head and what is behind it.
    """
    inner = 1 - F.max_pool2d(1 - truth.masks.flatten(0, 1), 3, stride=1, padding=1).view_as(truth.masks)
    if not bool((inner.sum((2, 3, 4)) > 0).all()):
        raise ConvloraError("a depth error needs a head in every view")
    return ((depths - truth.depths).abs() * inner).sum((2, 3, 4)) / inner.sum((2, 3, 4))


class Change(NamedTuple):
    """amount (N,), in the attribute's standard deviations; share (N,) of the picture's change that it explains."""

    amount: Tensor
    share: Tensor


def attribute_change(
    before: Tensor, after: Tensor, params: Tensor, traits: Tensor, labels: Tensor, name: str, *, reach: float = 3.0,
    count: int = 25, species: str | Species = "people",
) -> Change:  # fmt: skip
    """By how much an edit moved an attribute, found without any network.

    The change `after` − `before` (N, 3, R, R) is compared with the true changes of the moments params (N, PARAM_DIM),
    traits (N, TRAIT_DIM) from labels (N, 25), each drawn with the attribute `name` moved by `count` amounts within
    ±`reach`; the closest in least squares over the head is the amount. Its share, 1 − residual / ‖change‖², is 1 for
    the pure attribute, 0 where nothing of the change is it.

    Raises:
        ConvloraError: no such attribute, an even count (0 would not be among the amounts).
    """
    names = species_of(species).param_names
    if name not in names or count % 2 == 0:
        raise ConvloraError(f"no attribute {name!r} (there are {', '.join(names)}), or an even {count=}")
    poses, _ = cameras.split_label(labels)
    amounts = torch.linspace(-reach, reach, count)
    rows = params.repeat(count, 1)
    rows[:, names.index(name)] += amounts.repeat_interleave(len(params))
    side = before.shape[-1]
    drawn = world.render(rows, traits.repeat(count, 1), poses.repeat(count, 1, 1), None, side, species=species)
    images, masks = drawn.image.unflatten(0, (count, -1)), drawn.mask.unflatten(0, (count, -1))
    middle = count // 2
    head = torch.maximum(masks, masks[middle])  # what the head covers before or after
    changed = (after - before).cpu()
    residual = ((changed - (images - images[middle])).square() * head).sum((2, 3, 4))
    whole = (changed.square() * head).sum((2, 3, 4))
    share = 1 - residual / whole.clamp_min(1e-12)  # (count, N), each amount over its own head
    best = (share - 1e-4 * amounts.abs()[:, None]).argmax(0)  # where an attribute has ended, the nearest of equals
    return Change(amounts[best], share.gather(0, best[None])[0])
