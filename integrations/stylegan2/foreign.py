"""StyleGAN2 weights without a configuration: what tensors alone tell, and the names of rosinality's port.

Source of the second: https://github.com/rosinality/stylegan2-pytorch, whose weights have the official orientation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convlora.errors import FileError
from convlora.integrations.stylegan2.generator import MappingNetwork

_AVERAGED = 4096  # latents behind w_avg where the file has none, as many as rosinality's generate.py takes


def infer_config(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Arguments of `Generator` that give tensors of these names and shapes (official names).

    Shapes do not tell clamping and the mapping's learning-rate multiplier: no clamp, and the 0.01 that all have.

    Raises:
        FileError: the tensors are of no StyleGAN2 generator.
    """
    if "synthesis.input.freqs" in tensors:
        raise FileError(f"{source} holds a StyleGAN3 generator, whose layers are other ones: StyleGAN2(-ADA) is read")
    pattern = re.compile(r"synthesis\.b(\d+)\.conv1\.weight")
    widths = {int(m[1]): tensors[m[0]].shape[0] for m in map(pattern.fullmatch, tensors) if m and tensors[m[0]].ndim}
    torgb = f"synthesis.b{max(widths, default=4)}.torgb.weight"
    needed = ["mapping.fc0.weight", "synthesis.b4.conv1.affine.weight", torgb]
    absent = [key for key in needed if key not in tensors]
    if absent or 4 not in widths or any(tensors[key].ndim < 2 for key in needed):
        raise FileError(
            f"{source} has no 'config' in its metadata and no config.json beside it, and its tensors are not those of "
            f"a StyleGAN2 generator ({', '.join(absent or needed)} missing or of another shape)"
        )
    side = max(widths)
    widest = max(widths.values())
    base = widths[side] * side if widths[side] < widest else widest * side
    if any(width != min(base // r, widest) for r, width in widths.items()):
        raise FileError(f"{source}: the channels {widths} follow no channel_base: give its arguments in a config.json")
    layers = 0
    while f"mapping.fc{layers}.weight" in tensors:
        layers += 1
    first = tensors["mapping.fc0.weight"]
    embed = tensors.get("mapping.embed.weight")
    embedded, c_dim = (0, 0) if embed is None else tuple(embed.shape)
    mapping: dict[str, Any] = {"num_layers": layers}
    if layers > 1:
        mapping["layer_features"] = first.shape[0]
    if embed is not None:
        mapping["embed_features"] = embedded
    skips = any(key.endswith(".skip.weight") for key in tensors)
    architecture = "resnet" if skips else "skip" if side == 4 or "synthesis.b4.torgb.weight" in tensors else "orig"
    return dict(
        z_dim=first.shape[1] - embedded,
        c_dim=c_dim,
        w_dim=tensors[needed[1]].shape[1],
        img_resolution=side,
        img_channels=tensors[torgb].shape[0],
        mapping_kwargs=mapping,
        synthesis_kwargs=dict(
            channel_base=base,
            channel_max=widest,
            architecture=architecture,
            use_noise="synthesis.b4.conv1.noise_strength" in tensors,
            kernel_size=tensors["synthesis.b4.conv1.weight"].shape[-1],
            conv_clamp=None,
        ),
    )


def is_rosinality(tensors: Mapping[str, Any]) -> bool:
    """Whether the names are those of rosinality's Generator."""
    return "style.1.weight" in tensors and "input.input" in tensors


def from_rosinality(tensors: Mapping[str, Tensor], latent_avg: Tensor | None, source: str) -> dict[str, Tensor]:
    """The state of our `Generator` in rosinality's names, renamed; blur kernels are left out, being fixed.

    Without `latent_avg`, w_avg becomes the mean w of 4096 latents, which is what that code does when it draws images.

    Raises:
        FileError: a name that has no counterpart.
    """
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not key.endswith((".kernel", "latent_avg")):
            name = _official_name(key)
            if name is None:
                raise FileError(f"{source}: {key} is no tensor of rosinality's StyleGAN2 generator")
            out[name] = value.reshape(_official_shape(name, value)).clone()
    if latent_avg is None:
        latent_avg = _mean_w(out, source)
    out["mapping.w_avg"] = latent_avg.reshape(-1).clone()
    return out


_LAYER = re.compile(r"(convs|to_rgbs)\.(\d+)\.(.+)")
_INSIDE = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
    "bias": "bias",  # of to_rgb
}


def _official_name(key: str) -> str | None:
    head, _, rest = key.partition(".")
    if head == "style":
        number, _, kind = rest.partition(".")
        return f"mapping.fc{int(number) - 1}.{kind}" if number.isdigit() else None
    if key == "input.input":
        return "synthesis.b4.const"
    if head == "noises":
        number = rest.removeprefix("noise_")
        return f"{_layer(int(number))}.noise_const" if number.isdigit() else None
    if head in ("conv1", "to_rgb1"):
        layer, inside = f"synthesis.b4.{'conv1' if head == 'conv1' else 'torgb'}", rest
    elif match := _LAYER.fullmatch(key):
        index, inside = int(match[2]), match[3]
        layer = _layer(index + 1) if match[1] == "convs" else f"synthesis.b{8 << index}.torgb"
    else:
        return None
    return f"{layer}.{_INSIDE[inside]}" if inside in _INSIDE else None


def _layer(number: int) -> str:
    """The convolution of this number, from 0: b4.conv1, b8.conv0, b8.conv1, b16.conv0, …"""
    return f"synthesis.b{4 << (number + 1) // 2}.conv{(number + 1) % 2}"


def _official_shape(name: str, value: Tensor) -> tuple[int, ...]:
    if name.endswith("noise_strength"):
        return ()
    if name.endswith("noise_const"):
        return tuple(value.shape[-2:])
    if name.endswith(("const", ".weight")) and value.ndim in (4, 5) and value.shape[0] == 1:
        return tuple(value.shape[1:])
    return (-1,) if name.endswith(".bias") else tuple(value.shape)


def _mean_w(tensors: Mapping[str, Tensor], source: str) -> Tensor:
    config = infer_config(tensors, source)
    mapping = MappingNetwork(config["z_dim"], 0, config["w_dim"], None, **config["mapping_kwargs"])
    try:
        mapping.load_state_dict({key: tensors[f"mapping.{key}"] for key in mapping.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise FileError(f"{source}: its mapping network is incomplete or of other shapes ({error})") from None
    with torch.no_grad():
        return mapping(torch.randn(_AVERAGED, config["z_dim"], generator=torch.Generator().manual_seed(0))).mean(0)
