"""Constructor arguments of the released EG3D models, and of the small model this library ships ("lab").

The released checkpoints carry their own arguments, which win; these are for building a generator without one.
"""

from __future__ import annotations

import copy
from typing import Any

_COMMON: dict[str, Any] = dict(
    z_dim=512,
    c_dim=25,
    w_dim=512,
    img_channels=3,
    mapping_kwargs=dict(num_layers=2),
    channel_base=32768,
    channel_max=512,
    fused_modconv_default="inference_only",
    num_fp16_res=0,
    conv_clamp=None,
    sr_num_fp16_res=4,
    sr_kwargs=dict(channel_base=32768, channel_max=512, fused_modconv_default="inference_only"),
)

_RENDERING: dict[str, Any] = dict(
    disparity_space_sampling=False,
    clamp_mode="softplus",
    superresolution_noise_mode="none",
    density_reg=0.25,
    density_reg_p_dist=0.004,
    reg_type="l1",
    decoder_lr_mul=1.0,
    sr_antialias=True,
    c_scale=1.0,
)

_FACES: dict[str, Any] = dict(
    image_resolution=512,
    depth_resolution=48,
    depth_resolution_importance=48,
    ray_start=2.25,
    ray_end=3.3,
    box_warp=1,
    avg_camera_radius=2.7,
    c_gen_conditioning_zero=False,
)

_FFHQ = dict(_FACES, superresolution_module="SuperresolutionHybrid8XDC", avg_camera_pivot=[0, 0, 0.2])
_CATS = dict(_FACES, superresolution_module="SuperresolutionHybrid8X", avg_camera_pivot=[0, 0, -0.06])
_CARS: dict[str, Any] = dict(
    image_resolution=128,
    superresolution_module="SuperresolutionHybrid2X",
    depth_resolution=64,
    depth_resolution_importance=64,
    ray_start=0.1,
    ray_end=2.6,
    box_warp=1.6,
    white_back=True,
    avg_camera_radius=1.7,
    avg_camera_pivot=[0, 0, 0],
    c_gen_conditioning_zero=True,
    gpc_reg_prob=None,
)


def _official(rendering: dict[str, Any], neural: int, **more: Any) -> dict[str, Any]:
    config = copy.deepcopy(_COMMON)
    config["img_resolution"] = rendering["image_resolution"]
    config["neural_rendering_resolution"] = neural
    config["rendering_kwargs"] = copy.deepcopy({**_RENDERING, **rendering, **more})
    return config


_LAB: dict[str, Any] = dict(
    z_dim=96,
    c_dim=25,
    w_dim=256,
    img_resolution=128,
    img_channels=3,
    neural_rendering_resolution=64,
    plane_resolution=128,
    plane_channels=16,
    decoder_hidden=48,
    feature_channels=16,
    channel_base=4096,
    channel_max=128,
    mapping_kwargs=dict(num_layers=2, lr_multiplier=0.1, embed_features=128),
    num_fp16_res=0,
    conv_clamp=None,
    sr_num_fp16_res=0,
    sr_kwargs=dict(widths=[48, 32]),
    rendering_kwargs=dict(
        _RENDERING,
        image_resolution=128,
        superresolution_module="SuperresolutionHybrid2X",
        depth_resolution=20,
        depth_resolution_importance=20,
        ray_start=2.25,
        ray_end=3.3,
        box_warp=1,
        avg_camera_radius=2.7,
        avg_camera_pivot=[0, 0, 0],
        c_gen_conditioning_zero=True,
        clean_image_raw=True,
    ),
)

CONFIGS: dict[str, dict[str, Any]] = {
    "ffhq512-64": _official(_FFHQ, 64, gpc_reg_prob=0.5),
    "ffhq512-128": _official(_FFHQ, 128, gpc_reg_prob=0.5),
    "ffhqrebalanced512-64": _official(_FFHQ, 64, gpc_reg_prob=0.8),
    "ffhqrebalanced512-128": _official(_FFHQ, 128, gpc_reg_prob=0.8),
    "afhqcats512-128": _official(_CATS, 128, gpc_reg_prob=0.8),
    "shapenetcars128-64": _official(_CARS, 64),
    "shapenetcars128-128": _official(_CARS, 128),
    "lab": _LAB,
}
