"""Inpainting: what a hole hides, as this person would look (MyStyle section 4.3; My3DGen section 4.4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.tasks.blend import Blend, blend, check_blend, check_mask
from convlora.integrations.eg3d.tasks.hull import Hull
from convlora.integrations.eg3d.tasks.project import Projection, project


class Enhancement(NamedTuple):
    """images (B, 3, R, R): the result. `projection` holds what the generator drew, before it met the photo."""

    images: Tensor
    projection: Projection


def inpaint(
    G: TriPlaneGenerator,
    photos: Photos,
    hull: Hull,
    known: Tensor,
    steps: int = 300,
    *,
    how: Blend = "feather",
    width: float = 8.0,
    **options: Any,
) -> Enhancement:
    """Fill the holes of photos: generated where `known` (B or 1, 1, R, R) is 0, the photo elsewhere.

    Pixels of the hole are neither looked at nor kept. `how` and `width` are those of `blend`, options those of
    `project`: with `out`, an interrupted call goes on, and a second one may blend in another way.

    Raises:
        ConvloraError: a mask of another size or outside [0, 1]; a photo that is all hole, or has none; an unknown
            `how`; and what `project` raises.
    """
    check_blend(how)
    known = check_mask(known, photos.images).to(photos.images)
    found = project(G, holed(photos, known), hull, steps, **{"description": "inpainting", **options})
    return Enhancement(blend(found.images, photos.images, known, how, width), found)


def holed(photos: Photos, known: Tensor) -> Photos:
    """The photos with nothing left where `known` (B or 1, 1, R, R) is 0, and masks that say so.

    Raises:
        ConvloraError: a mask of another size or outside [0, 1]; a photo that is all hole, or has none.
    """
    known = check_mask(known, photos.images).to(photos.images).expand(len(photos), -1, -1, -1)
    seen = known if photos.masks is None else known * photos.masks
    empty = [name for name, most in zip(photos.names, seen.amax((1, 2, 3)).tolist()) if most == 0]
    if empty:
        raise ConvloraError(f"the mask leaves nothing of {', '.join(empty)}: at least some pixels must be known (1)")
    whole = [name for name, least in zip(photos.names, known.amin((1, 2, 3)).tolist()) if least == 1]
    if whole:
        raise ConvloraError(f"the mask has no hole in {', '.join(whole)}: 0 is to be filled; leave whole photos out")
    # so that nothing behind the hole can leak in, not even through a resize
    return replace(photos, images=torch.where(known > 0, photos.images, 0.0), masks=seen)
