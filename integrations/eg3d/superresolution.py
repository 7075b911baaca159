"""EG3D's super-resolution modules: two synthesis blocks on the rendered features, modulated by the last latent.

Source: Chan et al., https://arxiv.org/abs/2112.07945. One network; what tells the official classes apart is in MODULES.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.integrations.stylegan2.generator import BLOCK_OPTIONS, SynthesisBlock, known_options
from convlora.integrations.stylegan2.layers import FILTER
from convlora.integrations.stylegan2.ops import setup_filter


class Recipe(NamedTuple):
    """What tells one official module from another."""

    input_resolution: int
    widths: tuple[int, int]
    up_first: bool  # block0 up-samples too
    img_resolution: int
    resize: str  # "any": to input_resolution unless equal; "smaller": only upwards
    has_filter: bool  # the module itself owns an (unused) resample_filter
    antialias: bool = True


MODULES: dict[str, Recipe] = {
    "SuperresolutionHybrid8XDC": Recipe(128, (256, 128), True, 512, "any", False),
    "SuperresolutionHybrid8X": Recipe(128, (128, 64), True, 512, "any", True),
    "SuperresolutionHybrid4X": Recipe(128, (128, 64), False, 256, "smaller", True),
    "SuperresolutionHybrid2X": Recipe(64, (128, 64), False, 128, "any", True),
    "SuperresolutionHybridDeepfp32": Recipe(128, (128, 64), False, 256, "smaller", True, antialias=False),
}


class Superresolution(nn.Module):
    """Features (N, channels, R, R), whose first three channels are colours, to an image of side img_resolution."""

    def __init__(
        self,
        name: str,
        channels: int,
        img_resolution: int,
        sr_num_fp16_res: int = 4,
        sr_antialias: bool = True,
        w_dim: int = 512,
        widths: Sequence[int] | None = None,
        channel_base: int | None = None,  # given by the official configurations, used by no module
        channel_max: int | None = None,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        if name not in MODULES:
            raise ConvloraError(f"unknown super-resolution module {name!r}; one of {', '.join(MODULES)}")
        recipe = MODULES[name]
        if img_resolution != recipe.img_resolution:
            raise ConvloraError(f"{name} makes images of {recipe.img_resolution} pixels, not {img_resolution}")
        block_kwargs = known_options(block_kwargs, BLOCK_OPTIONS | {"num_fp16_res"}, "sr_kwargs")
        block_kwargs = {k: v for k, v in block_kwargs.items() if k not in ("num_fp16_res", "conv_clamp")}
        self.name = name
        self.recipe = recipe
        self.input_resolution = recipe.input_resolution
        self.sr_antialias = sr_antialias and recipe.antialias
        half = sr_num_fp16_res > 0
        # the clamp belongs to half precision, but the official modules keep it in float32 too
        block_kwargs |= dict(img_channels=3, w_dim=w_dim, use_fp16=half, conv_clamp=256 if half else None)
        first, second = recipe.widths if widths is None else widths
        up = 2 if recipe.up_first else 1
        self.block0 = SynthesisBlock(
            channels, first, resolution=img_resolution // 2, is_last=False, up=up, **block_kwargs
        )
        self.block1 = SynthesisBlock(first, second, resolution=img_resolution, is_last=True, **block_kwargs)
        if recipe.has_filter:
            self.register_buffer("resample_filter", setup_filter(FILTER))

    def forward(
        self, rgb: Tensor, x: Tensor, ws: Tensor, return_raw: bool = False, **block_kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """rgb (N, 3, R, R), x (N, channels, R, R), ws (N, num_ws, w_dim); every layer uses the last latent.

        return_raw=True also gives what the official code leaves in `rgb`: without resizing and without up-sampling
        in block0, that block adds its ToRGB to the rendered image *in place*, so the raw image carries it too.
        """
        ws = ws[:, -1:].expand(-1, 3, -1)
        raw = rgb
        side, target = x.shape[-1], self.input_resolution
        if side > target and self.recipe.resize == "smaller":
            raise ConvloraError(f"{self.name} takes features of at most {target} pixels, got {side}")
        if side != target:
            x, rgb = (
                F.interpolate(
                    t, size=(target, target), mode="bilinear", align_corners=False, antialias=self.sr_antialias
                )
                for t in (x, rgb)
            )
        x, img = self.block0(x, rgb, ws, **block_kwargs)
        if side == target and not self.recipe.up_first:
            raw = img
        _, image = self.block1(x, img, ws, **block_kwargs)
        return (image, raw) if return_raw else image


# the official class names, for code that constructs the modules by themselves
SuperresolutionHybrid8XDC = partial(Superresolution, "SuperresolutionHybrid8XDC")
SuperresolutionHybrid8X = partial(Superresolution, "SuperresolutionHybrid8X")
SuperresolutionHybrid4X = partial(Superresolution, "SuperresolutionHybrid4X")
SuperresolutionHybrid2X = partial(Superresolution, "SuperresolutionHybrid2X")
