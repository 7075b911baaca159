"""Constructor arguments of StyleGAN2-ADA's official configurations, for files that carry none, and to build from.

Source: Karras et al., https://arxiv.org/abs/2006.06676, and the names of its training program. All have z and w of 512
numbers, no label, at most 512 channels, activations clamped to 256 and the four highest resolutions marked as half
precision. The paper's configurations and config-f ("stylegan2") map with 8 layers, "auto" with 2.
"""

from __future__ import annotations

from typing import Any


def _ada(resolution: int, layers: int, feature_maps: float) -> dict[str, Any]:
    return dict(
        z_dim=512,
        c_dim=0,
        w_dim=512,
        img_resolution=resolution,
        img_channels=3,
        mapping_kwargs=dict(num_layers=layers),
        synthesis_kwargs=dict(
            channel_base=round(32768 * feature_maps), channel_max=512, num_fp16_res=4, conv_clamp=256
        ),
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "stylegan2": _ada(1024, 8, 1),
    "paper256": _ada(256, 8, 0.5),
    "paper512": _ada(512, 8, 1),
    "paper1024": _ada(1024, 8, 1),
    "auto256": _ada(256, 2, 0.5),
    "auto512": _ada(512, 2, 1),
    "auto1024": _ada(1024, 2, 1),
}
