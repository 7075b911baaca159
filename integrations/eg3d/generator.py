"""EG3D's tri-plane generator with the official key tree, argument names and numbers.

Source: Chan et al., "Efficient Geometry-aware 3D Generative Adversarial Networks", https://arxiv.org/abs/2112.07945.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.cameras import split_label
from convlora.integrations.eg3d.renderer import (
    ImportanceRenderer,
    RaySampler,
    Rendering,
    Samples,
    draw_samples,
)
from convlora.integrations.eg3d.superresolution import Superresolution
from convlora.integrations.stylegan2.generator import Begun, Generator
from convlora.integrations.stylegan2.layers import FullyConnectedLayer
from convlora.integrations.stylegan2.ops import differentiable


class OSGDecoder(nn.Module):
    """Mean plane features to density and colour features: FC, softplus, FC."""

    def __init__(self, channels: int, hidden: int, features: int, lr_multiplier: float = 1.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            FullyConnectedLayer(channels, hidden, lr_multiplier=lr_multiplier),
            nn.Softplus(),
            FullyConnectedLayer(hidden, 1 + features, lr_multiplier=lr_multiplier),
        )

    def forward(self, features: Tensor, directions: Tensor | None = None) -> dict[str, Tensor]:
        """features (N, P, C), or (N, 3, P, C) of the single planes -> rgb (N, P, F) in [0, 1], sigma (N, P, 1) raw.

        The view direction is not used: appearance does not depend on it.
        """
        if features.ndim == 4:
            features = features.mean(1)
        out = self.net(features)
        sigma, rgb = out.split([1, out.shape[-1] - 1], dim=-1)
        rgb = torch.sigmoid(rgb)
        # reaches 0 and 1 without saturating
        rgb = rgb * 1.002 - 0.001 if differentiable(rgb) else rgb.mul_(1.002).sub_(0.001)
        return {"rgb": rgb, "sigma": sigma}


def _directly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class TriPlaneGenerator(nn.Module):
    """z (N, z_dim) and camera label c (N, 25) to image, image_raw and image_depth.

    The arguments after sr_kwargs are not in the official class; their defaults are what it has fixed inside:
    plane_resolution and plane_channels of each of the three planes, decoder_hidden, feature_channels of the rendered
    image (the first three are its colours), and the neural_rendering_resolution that official files carry as an
    attribute. rendering_kwargs may also hold clean_image_raw=True, which keeps the super-resolution's in-place
    addition out of image_raw. Further keywords go to the backbone's synthesis network.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int = 3,
        sr_num_fp16_res: int = 0,
        mapping_kwargs: Mapping[str, Any] | None = None,
        rendering_kwargs: Mapping[str, Any] | None = None,
        sr_kwargs: Mapping[str, Any] | None = None,
        plane_resolution: int = 256,
        plane_channels: int = 32,
        decoder_hidden: int = 64,
        feature_channels: int = 32,
        neural_rendering_resolution: int = 64,
        **synthesis_kwargs: Any,
    ) -> None:
        super().__init__()
        if img_channels != 3:
            raise ConvloraError(f"img_channels is {img_channels}; EG3D renders 3 colours")
        if feature_channels < 3:
            raise ConvloraError(f"feature_channels is {feature_channels}; the first 3 are the colours")
        given = dict(
            z_dim=z_dim,
            c_dim=c_dim,
            w_dim=w_dim,
            img_resolution=img_resolution,
            img_channels=img_channels,
            sr_num_fp16_res=sr_num_fp16_res,
            mapping_kwargs=dict(mapping_kwargs or {}),
            rendering_kwargs=dict(rendering_kwargs or {}),
            sr_kwargs=dict(sr_kwargs or {}),
            plane_resolution=plane_resolution,
            plane_channels=plane_channels,
            decoder_hidden=decoder_hidden,
            feature_channels=feature_channels,
            **{"conv_clamp": 256, **synthesis_kwargs},
        )
        self._arguments: dict[str, Any] = copy.deepcopy(given)
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.w_dim = w_dim
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.plane_channels = plane_channels
        self.rendering_kwargs: dict[str, Any] = copy.deepcopy(given["rendering_kwargs"])
        self.neural_rendering_resolution = neural_rendering_resolution
        self.renderer = ImportanceRenderer()
        self.ray_sampler = RaySampler()
        self.backbone = Generator(
            z_dim,
            c_dim,
            w_dim,
            img_resolution=plane_resolution,
            img_channels=3 * plane_channels,
            mapping_kwargs=given["mapping_kwargs"],
            **{"conv_clamp": 256, **synthesis_kwargs},
        )
        self.num_ws = self.backbone.num_ws
        name = self.rendering_kwargs.get("superresolution_module")
        if not isinstance(name, str):
            raise ConvloraError(
                "rendering_kwargs needs 'superresolution_module', the name of a super-resolution module"
            )
        self.superresolution = Superresolution(
            name.rpartition(".")[2],
            channels=feature_channels,
            img_resolution=img_resolution,
            sr_num_fp16_res=sr_num_fp16_res,
            sr_antialias=self.rendering_kwargs.get("sr_antialias", True),
            w_dim=w_dim,
            **given["sr_kwargs"],
        )
        self.decoder = OSGDecoder(
            plane_channels, decoder_hidden, feature_channels, self.rendering_kwargs.get("decoder_lr_mul", 1.0)
        )
        self._last_planes: Tensor | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The constructor arguments, with the attributes as they are now; `TriPlaneGenerator(**G.config)` is alike."""
        current = dict(
            rendering_kwargs=self.rendering_kwargs, neural_rendering_resolution=self.neural_rendering_resolution
        )
        return copy.deepcopy({**self._arguments, **current})

    def mapping(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """ws (N, num_ws, w_dim) from z (N, z_dim) and the conditioning label c (N, 25), which is often frontal."""
        if self.rendering_kwargs.get("c_gen_conditioning_zero", False):
            c = z.new_zeros((z.shape[0], self.c_dim))
        elif c is None and self.c_dim > 0:
            raise ConvloraError(
                "this generator is conditioned on a camera: give mapping a label c, e.g. cameras.frontal()"
            )
        else:
            # a missing c_scale counts as 0 in the official code
            c = None if c is None else c * self.rendering_kwargs.get("c_scale", 0)
        return self.backbone.mapping(z, c, truncation_psi, truncation_cutoff, update_emas=update_emas)

    def planes(self, ws: Tensor, noise_mode: str = "random", **block_kwargs: Any) -> Tensor:
        """Tri-planes (N, 3, plane_channels, R, R): what synthesis(planes=...) takes, to render many views of one ws."""
        out = self.backbone.synthesis(ws, noise_mode=noise_mode, **block_kwargs)
        return out.unflatten(1, (3, self.plane_channels))

    def samples(self, count: int, resolution: int | None = None, generator: torch.Generator | None = None) -> Samples:
        """Random numbers for rendering `count` images: what synthesis draws for itself if it gets none."""
        side = self.neural_rendering_resolution if resolution is None else resolution
        parameter = next(self.decoder.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        origins = parameter.new_empty(count, side * side, 0, dtype=dtype)
        return draw_samples(origins, self.rendering_kwargs, generator=generator)

    def render(
        self,
        planes: Tensor,
        c: Tensor,
        resolution: int,
        deterministic: bool = False,
        samples: Samples | None = None,
    ) -> Rendering:
        """Volume rendering without super-resolution: features (N, resolution^2, feature_channels), row by row."""
        cam2world, intrinsics = split_label(c.to(planes.dtype))
        if len(planes) == 1 < len(c):
            planes = planes.expand(len(c), -1, -1, -1, -1)
        origins, directions = self.ray_sampler(cam2world, intrinsics, resolution)
        return self.renderer(planes, self.decoder, origins, directions, self.rendering_kwargs, deterministic, samples)

    def synthesis(
        self,
        ws: Tensor,
        c: Tensor,
        neural_rendering_resolution: int | None = None,
        update_emas: bool = False,
        cache_backbone: bool = False,
        use_cached_backbone: bool = False,
        noise_mode: str = "random",
        deterministic: bool = False,
        planes: Tensor | None = None,
        samples: Samples | None = None,
        begun: Begun | None = None,
        checkpointing: bool = False,
        **block_kwargs: Any,
    ) -> dict[str, Tensor]:
        """image (N, 3, img_resolution^2), image_raw (N, 3, R, R) and image_depth (N, 1, R, R); R is stored if given.

        ws (N, num_ws, w_dim), c (N, 25). noise_mode ('random', 'const', 'none') is the backbone's; deterministic=True
        fixes the renderer's samples, and samples gives them. planes reuses the result of planes(ws), and begun that
        of the backbone's first blocks, `backbone.synthesis.advance(ws, blocks)`. checkpointing=True keeps nothing
        inside backbone, renderer and super-resolution for backward, which computes each once more.
        block_kwargs: fused_modconv, force_fp32.
        """
        if neural_rendering_resolution is None:
            neural_rendering_resolution = self.neural_rendering_resolution
        else:
            self.neural_rendering_resolution = neural_rendering_resolution
        side = neural_rendering_resolution
        part = partial(checkpoint, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else _directly
        if planes is None and use_cached_backbone:
            planes = self._last_planes
        if planes is None:
            planes = part(self.planes, ws, noise_mode=noise_mode, begun=begun, **block_kwargs)
        if cache_backbone:
            self._last_planes = planes
        rendering = part(self.render, planes, c, side, deterministic, samples)
        features = rendering.features.transpose(1, 2).unflatten(2, (side, side))
        rgb = features[:, :3]
        image, raw = part(
            self.superresolution,
            rgb,
            features,
            ws,
            return_raw=True,
            noise_mode=self.rendering_kwargs.get("superresolution_noise_mode", "none"),
            **block_kwargs,
        )
        clean = self.rendering_kwargs.get("clean_image_raw", False)
        depth = rendering.depth.transpose(1, 2).unflatten(2, (side, side))
        return {"image": image, "image_raw": rgb if clean else raw, "image_depth": depth}

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs: Any,
    ) -> dict[str, Tensor]:
        """mapping and synthesis with the same label."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), c, **synthesis_kwargs)

    def sample_mixed(
        self,
        coordinates: Tensor,
        directions: Tensor | None,
        ws: Tensor | None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
        noise_mode: str = "random",
        planes: Tensor | None = None,
        **block_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Raw density sigma (N, P, 1) and features rgb (N, P, feature_channels) at coordinates (N, P, 3) in the world.

        truncation_* and update_emas are accepted as in the official signature; ws are used as they come, and not
        needed with planes.
        """
        if planes is None:
            if ws is None:
                raise ConvloraError("sample_mixed needs ws, or the planes(ws) made from them")
            planes = self.planes(ws, noise_mode=noise_mode, **block_kwargs)
        points = coordinates.to(planes.dtype)
        return self.renderer.run_model(planes, self.decoder, points, directions, self.rendering_kwargs)

    def sample(
        self,
        coordinates: Tensor,
        directions: Tensor | None,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs: Any,
    ) -> dict[str, Tensor]:
        """sample_mixed for z and the conditioning label c."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.sample_mixed(coordinates, directions, ws, **synthesis_kwargs)
