"""Super-resolution: a tiny photo as this person would look (MyStyle section 4.3; My3DGen section 4.4: 32 to 512)."""

from __future__ import annotations

from functools import partial
from typing import Any

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.tasks.degrade import Downsampling, check_downsampling, downsample
from convlora.integrations.eg3d.tasks.hull import Hull
from convlora.integrations.eg3d.tasks.inpaint import Enhancement
from convlora.integrations.eg3d.tasks.project import project


def upscale(
    G: TriPlaneGenerator, photos: Photos, hull: Hull, steps: int = 300, *, how: Downsampling = "area", **options: Any
) -> Enhancement:
    """Bring small photos, images (B, 3, r, r), to the generator's resolution; `how` they were made small must match.

    The factor is R/r; options are those of `project`: with `out`, an interrupted call goes on.

    Raises:
        ConvloraError: photos whose side does not divide the generator's; an unknown `how`; and what `project` raises.
    """
    check_downsampling(how)
    side = photos.images.shape[-1]
    if side >= G.img_resolution or G.img_resolution % side:
        raise ConvloraError(
            f"photos of {side} pixels cannot be upscaled to {G.img_resolution}: "
            "the side must divide that and be smaller"
        )
    factor = G.img_resolution // side
    smaller = partial(downsample, factor=factor, how=how)
    found = project(G, photos, hull, steps, degrade=smaller, **{"description": "upscaling", **options})
    return Enhancement(found.images, found)
