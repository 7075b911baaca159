"""Mapping network, synthesis blocks and the StyleGAN2 generator, with the official key tree and argument names.

Source: Karras et al., https://arxiv.org/abs/1912.04958 and https://arxiv.org/abs/2006.06676.
Computation has the type of the parameters, float32 as built; a call with force_fp32=False lets blocks that are marked
as half precision use it on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convlora.errors import ConvloraError
from convlora.integrations.stylegan2.layers import (
    FILTER,
    Conv2dLayer,
    FullyConnectedLayer,
    SynthesisLayer,
    ToRGBLayer,
)
from convlora.integrations.stylegan2.ops import normalize_2nd_moment, setup_filter, upsample2d

BLOCK_OPTIONS = frozenset(
    {"architecture", "resample_filter", "conv_clamp", "fused_modconv_default", "use_noise", "activation", "kernel_size"}
)
MAPPING_OPTIONS = frozenset(
    {"num_layers", "embed_features", "layer_features", "activation", "lr_multiplier", "w_avg_beta"}
)
# official keywords about training, memory layout or object construction: they change no number computed here
IGNORED_OPTIONS = frozenset(
    {
        "class_name",
        "fp16_channels_last",
        "channels_last",
        "force_fp32",
        "magnitude_ema_beta",
        "use_fp16",
        "cudnn_benchmark",
    }
)

# From this resolution on, a CPU convolves faster with channels last; below, that has it copy every weight first.
_WIDE = 64


def known_options(options: Mapping[str, Any], known: Collection[str], owner: str) -> dict[str, Any]:
    """The options `owner` understands; silently drops IGNORED_OPTIONS, refuses anything else by name."""
    unknown = sorted(set(options) - set(known) - IGNORED_OPTIONS)
    if unknown:
        raise ConvloraError(f"{owner} has no option {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    return {name: value for name, value in options.items() if name in known}


class MappingNetwork(nn.Module):
    """z (N, z_dim) and label c (N, c_dim) to ws (N, num_ws, w_dim), or (N, w_dim) if num_ws is None."""

    w_avg: Tensor
    fc0: FullyConnectedLayer

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.998,
    ) -> None:
        super().__init__()
        if z_dim == 0 and c_dim == 0:
            raise ConvloraError("a mapping network needs an input: z_dim and c_dim are both 0")
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        self.w_avg_beta = w_avg_beta
        embed_features = (w_dim if embed_features is None else embed_features) if c_dim > 0 else 0
        layer_features = w_dim if layer_features is None else layer_features
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        if num_layers < 1:
            raise ConvloraError(f"num_layers is {num_layers}; a mapping network has at least one layer")
        widths = [z_dim + embed_features] + [layer_features] * (num_layers - 1) + [w_dim]
        for i in range(num_layers):
            layer = FullyConnectedLayer(widths[i], widths[i + 1], activation=activation, lr_multiplier=lr_multiplier)
            setattr(self, f"fc{i}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        skip_w_avg_update: bool = True,
    ) -> Tensor:
        dtype = self.fc0.bias.dtype  # type: ignore[union-attr]  # these layers have one
        parts = []
        if self.z_dim > 0:
            parts.append(normalize_2nd_moment(_features(z, self.z_dim, "z").to(dtype)))
        if self.c_dim > 0:
            parts.append(normalize_2nd_moment(self.embed(_features(c, self.c_dim, "c").to(dtype))))
        x = torch.cat(parts, dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        if (update_emas or not skip_w_avg_update) and self.w_avg_beta is not None and self.num_ws is not None:
            self.w_avg.copy_(x.detach().mean(dim=0).to(self.w_avg.dtype).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is not None:
            x = x.unsqueeze(1).repeat(1, self.num_ws, 1)
        if truncation_psi == 1:
            return x
        if self.num_ws is None or self.w_avg_beta is None:
            raise ConvloraError("this mapping network keeps no average w to truncate towards; use truncation_psi=1")
        if truncation_cutoff is None:
            return self.w_avg.lerp(x, truncation_psi)
        head = self.w_avg.lerp(x[:, :truncation_cutoff], truncation_psi)
        return torch.cat([head, x[:, truncation_cutoff:]], dim=1)


def _features(x: Tensor | None, width: int, name: str) -> Tensor:
    if x is None or x.ndim != 2 or x.shape[1] != width:
        got = "None" if x is None else f"shape {tuple(x.shape)}"
        raise ConvloraError(f"the mapping network takes {name} of shape (N, {width}), got {got}")
    return x


class SynthesisBlock(nn.Module):
    """One resolution: conv0 (up-samples), conv1 and, where the architecture has it, ToRGB.

    up=1 gives EG3D's super-resolution block that keeps the size of x and of the image.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool,
        architecture: str = "skip",
        resample_filter: Sequence[float] = FILTER,
        conv_clamp: float | None = 256,
        use_fp16: bool = False,
        fused_modconv_default: bool | str = "inference_only",
        up: int = 2,
        **layer_kwargs: Any,
    ) -> None:
        super().__init__()
        if architecture not in ("skip", "resnet", "orig"):
            raise ConvloraError(f"architecture is {architecture!r}; one of skip, resnet, orig")
        self.in_channels = in_channels
        self.w_dim = w_dim
        self.resolution = resolution
        self.img_channels = img_channels
        self.is_last = is_last
        self.architecture = architecture
        self.use_fp16 = use_fp16
        self.fused_modconv_default = fused_modconv_default
        self.up = up
        self.num_conv = 0
        self.num_torgb = 0
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        common = dict(w_dim=w_dim, resolution=resolution, conv_clamp=conv_clamp, **layer_kwargs)
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=up, resample_filter=resample_filter, **common)
            self.num_conv += 1
        self.conv1 = SynthesisLayer(out_channels, out_channels, **common)
        self.num_conv += 1
        if is_last or architecture == "skip":
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim=w_dim, conv_clamp=conv_clamp)
            self.num_torgb += 1
        if in_channels != 0 and architecture == "resnet":
            self.skip = Conv2dLayer(
                in_channels, out_channels, kernel_size=1, bias=False, up=up, resample_filter=resample_filter
            )

    def _fused(self, choice: bool | None, x_device: torch.device, batch: int) -> bool:
        if choice is not None:
            return choice
        if self.fused_modconv_default != "inference_only":
            return bool(self.fused_modconv_default)
        # Equal in exact arithmetic. Grouped convolutions of several samples are slow on a CPU, and the gradient of the
        # styles through weights per sample costs one of the weights' size, even if these are frozen.
        recorded = torch.is_grad_enabled()
        return not self.training and not recorded and (batch == 1 or x_device.type != "cpu")

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: Tensor,
        force_fp32: bool = True,
        fused_modconv: bool | None = None,
        update_emas: bool = False,
        **layer_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, in, R/up, R/up) or None, img (N, img, R/up, R/up) or None, ws (N, num_conv + num_torgb, w_dim)."""
        w = iter(ws.unbind(dim=1))
        fused = self._fused(fused_modconv, ws.device, ws.shape[0])
        half = self.use_fp16 and not force_fp32 and ws.is_cuda
        if self.in_channels == 0:
            x = self.const.unsqueeze(0).expand(ws.shape[0], -1, -1, -1)
        elif x is None:
            raise ConvloraError(f"the block of resolution {self.resolution} continues another one and needs its x")
        if half:
            x = x.to(torch.float16)
        if half or (x.device.type == "cpu" and self.resolution >= _WIDE):
            x = x.contiguous(memory_format=torch.channels_last)

        if self.in_channels == 0:
            x = self.conv1(x, next(w), fused_modconv=fused, **layer_kwargs)
        elif self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            x = self.conv0(x, next(w), fused_modconv=fused, **layer_kwargs)
            x = y + self.conv1(x, next(w), fused_modconv=fused, gain=math.sqrt(0.5), **layer_kwargs)
        else:
            x = self.conv0(x, next(w), fused_modconv=fused, **layer_kwargs)
            x = self.conv1(x, next(w), fused_modconv=fused, **layer_kwargs)

        if img is not None and self.up > 1:
            img = upsample2d(img, self.resample_filter, up=self.up)
        if self.num_torgb:
            y = self.torgb(x, next(w), fused_modconv=fused)
            y = y.to(torch.promote_types(y.dtype, torch.float32))  # images add up in full precision
            img = y if img is None else img + y
        return x, img


class Begun(NamedTuple):
    """A synthesis between two blocks: how many have run, and what they hand on."""

    blocks: int = 0
    x: Tensor | None = None  # (N, channels, R, R)
    img: Tensor | None = None  # (N, img_channels, R, R); None too where only the last block draws

    def rows(self, which: Tensor | slice) -> Begun:
        """The state of these samples."""
        x, img = (None if part is None else part[which] for part in (self.x, self.img))
        return Begun(self.blocks, x, img)


class SynthesisNetwork(nn.Module):
    """ws (N, num_ws, w_dim) to an image (N, img_channels, img_resolution, img_resolution)."""

    b4: SynthesisBlock

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        if img_resolution < 4 or img_resolution & (img_resolution - 1):
            raise ConvloraError(f"img_resolution is {img_resolution}; it must be a power of two from 4 up")
        block_kwargs = known_options(block_kwargs, BLOCK_OPTIONS, "SynthesisNetwork")
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        log2 = img_resolution.bit_length() - 1
        self.block_resolutions = [2**i for i in range(2, log2 + 1)]
        half_from = max(2 ** (log2 + 1 - num_fp16_res), 8)
        self.num_ws = 0
        in_channels = 0
        for resolution in self.block_resolutions:
            out_channels = min(channel_base // resolution, channel_max)
            block = SynthesisBlock(
                in_channels,
                out_channels,
                w_dim=w_dim,
                resolution=resolution,
                img_channels=img_channels,
                is_last=resolution == img_resolution,
                use_fp16=num_fp16_res > 0 and resolution >= half_from,
                **block_kwargs,
            )
            setattr(self, f"b{resolution}", block)
            self.num_ws += block.num_conv
            in_channels = out_channels
        self.num_ws += block.num_torgb

    def forward(self, ws: Tensor, begun: Begun | None = None, **block_kwargs: Any) -> Tensor:
        """noise_mode: 'random' (default), 'const' or 'none'; fused_modconv, force_fp32 as in SynthesisBlock.

        begun: what `advance` returned for these ws, to go on from.
        """
        img = self.advance(ws, len(self.block_resolutions), begun, **block_kwargs).img
        assert img is not None  # the last block always has a ToRGB
        return img

    def advance(self, ws: Tensor, blocks: int, begun: Begun | None = None, **block_kwargs: Any) -> Begun:
        """Run up to the first `blocks` blocks; where their weights and ws stay the same, so does the result."""
        if ws.ndim != 3 or tuple(ws.shape[1:]) != (self.num_ws, self.w_dim):
            raise ConvloraError(f"ws must have shape (N, {self.num_ws}, {self.w_dim}), got {tuple(ws.shape)}")
        ws = ws.to(self.b4.const.dtype)
        done, x, img = begun or Begun()
        first = 0
        for index, resolution in enumerate(self.block_resolutions[:blocks]):
            block = getattr(self, f"b{resolution}")
            if index >= done:
                # ToRGB shares its vector with conv0 of the next block: the cursor moves on by the convs alone
                x, img = block(x, img, ws[:, first : first + block.num_conv + block.num_torgb], **block_kwargs)
            first += block.num_conv
        return Begun(max(done, blocks), x, img)


class Generator(nn.Module):
    """StyleGAN2(-ADA) generator: z (N, z_dim), c (N, c_dim) to an image.

    Synthesis options come nested in synthesis_kwargs (StyleGAN2-ADA) or as flat keywords (StyleGAN3 and EG3D code);
    the two code bases differ in one default, conv_clamp: None when nested, 256 when flat.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: Mapping[str, Any] | None = None,
        synthesis_kwargs: Mapping[str, Any] | None = None,
        **flat_kwargs: Any,
    ) -> None:
        super().__init__()
        known = BLOCK_OPTIONS | {"channel_base", "channel_max", "num_fp16_res"}
        options: dict[str, Any] = {"conv_clamp": 256 if flat_kwargs and synthesis_kwargs is None else None}
        options |= known_options(synthesis_kwargs or {}, known, "synthesis_kwargs")
        options |= known_options(flat_kwargs, known, "Generator")
        mapping_options = known_options(mapping_kwargs or {}, MAPPING_OPTIONS, "mapping_kwargs")
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **options)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **mapping_options)
        self.config: dict[str, Any] = dict(
            z_dim=z_dim,
            c_dim=c_dim,
            w_dim=w_dim,
            img_resolution=img_resolution,
            img_channels=img_channels,
            mapping_kwargs=mapping_options,
            synthesis_kwargs=options,
        )

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        **synthesis_kwargs: Any,
    ) -> Tensor:
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas=update_emas)
        return self.synthesis(ws, **synthesis_kwargs)
