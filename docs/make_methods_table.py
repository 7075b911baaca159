"""Measure every method on every kind of layer and write docs/methods_table.md; some minutes.

python docs/make_methods_table.py [--out FILE] [--methods lora,para] [--layers "conv 3×3,linear"] [--no-eg3d]

A run is a small model with one layer of the kind, in float64: inject at rank 2, train 20 steps, merge, unmerge, save,
load on a fresh copy of the base. Nothing in the table is written by hand.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convlora
from convlora.integrations import eg3d
from convlora.integrations.stylegan2.layers import SynthesisLayer, ToRGBLayer

RANK = 2
# PaRa takes something away, so without its warm-up it cannot start as the identity.
OPTIONS = {"para": {"warmup": 1}}


class EqualizedConv(nn.Conv2d):
    """A subclass that scales its weight at run time."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * 0.1, self.bias, self.stride, self.padding)


class OwnConstructor(nn.Conv2d):
    """A subclass that cannot be built again from the attributes of an nn.Conv2d."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1, bias=False)


class RawWeight(nn.Module):
    """A bare parameter, used in a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class Modulated(nn.Module):
    """Calls a StyleGAN2 layer with fixed latents; not fused, which is where the low-rank path matters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("w", torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        extra = {"noise_mode": "const"} if isinstance(self.layer, SynthesisLayer) else {}
        y: Tensor = self.layer(x, self.w, fused_modconv=False, **extra)
        return y


def lazy() -> nn.Module:
    layer = nn.LazyConv2d(6, 3)
    layer(torch.zeros(1, 8, 9, 9))
    return layer


Make = Callable[[], nn.Module]
IMAGE = (2, 8, 9, 9)
LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (2, 8)),
    "conv 3×3": (lambda: nn.Conv2d(8, 6, 3, padding=1), IMAGE),
    "conv 1×1": (lambda: nn.Conv2d(8, 6, 1), IMAGE),
    "stride 2": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), IMAGE),
    "dilation 2": (lambda: nn.Conv2d(8, 6, 3, dilation=2), IMAGE),
    "dilation 2, padding 2": (lambda: nn.Conv2d(8, 6, 3, dilation=2, padding=2), IMAGE),
    'dilation 2, padding "same"': (lambda: nn.Conv2d(8, 6, 3, dilation=2, padding="same"), IMAGE),
    "reflect padding": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "circular padding": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), IMAGE),
    "2 groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), IMAGE),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), IMAGE),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1), IMAGE),
    "conv 1-D": (lambda: nn.Conv1d(8, 6, 3, padding=1), (2, 8, 9)),
    "conv 3-D": (lambda: nn.Conv3d(4, 6, 3, padding=1), (1, 4, 5, 5, 5)),
    "conv 3-D 1×1×3": (lambda: nn.Conv3d(4, 6, (1, 1, 3)), (1, 4, 5, 5, 5)),
    "conv 3-D 1×1×1": (lambda: nn.Conv3d(4, 6, 1), (1, 4, 5, 5, 5)),
    "lazy conv": (lazy, IMAGE),
    "bfloat16 base": (lambda: nn.Conv2d(8, 6, 3).bfloat16(), IMAGE),
    "StyleGAN2 conv": (lambda: Modulated(SynthesisLayer(8, 6, 5, 9)), IMAGE),
    "StyleGAN2 conv, up": (lambda: Modulated(SynthesisLayer(8, 6, 5, 18, up=2)), IMAGE),
    "StyleGAN2 ToRGB": (lambda: Modulated(ToRGBLayer(8, 3, 5)), IMAGE),
    "raw weight": (RawWeight, IMAGE),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), IMAGE),
    "weight_norm, old": (lambda: nn.utils.weight_norm(nn.Conv2d(8, 6, 3)), IMAGE),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 6, 3)), IMAGE),
    "spectral_norm, old": (lambda: nn.utils.spectral_norm(nn.Conv2d(8, 6, 3)), IMAGE),
    "scaling subclass": (lambda: EqualizedConv(8, 6, 3, padding=1), IMAGE),
    "own constructor": (lambda: OwnConstructor(8), IMAGE),
}


class Cell(NamedTuple):
    """What was measured; `merge_error` is the merged output's largest difference to that of either compute path."""

    identity: bool
    trains: bool
    merge_error: float
    unmerge: bool
    file: bool

    def __str__(self) -> str:
        failed = [name for name in ("identity", "trains", "unmerge", "file") if not getattr(self, name)]
        return " ".join(
            [f"{self.merge_error:.0e}" if self.merge_error else "0", *(f"**no {name}**" for name in failed)]
        )


def measure(method: str, layer: str, folder: Path) -> Cell | str:
    """One cell, or the reason why this method does not take this layer."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = nn.Sequential(make()).eval()
    dtype = torch.bfloat16 if layer == "bfloat16 base" else torch.float64
    model, x = model.to(dtype), torch.randn(shape).to(dtype)
    targets = ["*layer"] if isinstance(model[0], Modulated) else None
    with torch.no_grad():
        y0 = model(x)
    base = copy.deepcopy(model)
    rank = RANK if convlora.METHODS[method].default_rank else None
    try:
        adapter = convlora.inject(model, method, rank, targets=targets, **OPTIONS.get(method, {}))
    except convlora.ConvloraError as error:
        return "left out" if "nothing to train" in str(error) else "refused"
    identity = torch.equal(model(x), y0)

    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    goal, losses = y0 + y0.float().std().to(dtype) * torch.randn_like(y0), []
    for _ in range(21):
        loss = (model(x) - goal).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adapter.step()
        losses.append(loss.item())
    moved = all(not torch.equal(before[name], p) for name, p in adapter.named_parameters())
    trains = losses[-1] < losses[1] and moved  # losses[0] is the base's

    with torch.no_grad():
        y1, outputs = model(x), [model(x)]
        fresh = copy.deepcopy(base)
        convlora.load_adapter(fresh, adapter.save(folder / "cell.safetensors"))
        file = torch.equal(fresh(x), y1)
        try:
            other = convlora.inject(base, method, rank, targets=targets, path="low_rank", **OPTIONS.get(method, {}))
            other.load_state_dict(adapter.state_dict())
            outputs.append(base(x))
        except convlora.ConvloraError:
            pass  # this method or this layer has the weight path only
        adapter.merge()
        error = max(float((model(x) - y).abs().max() / y.abs().max()) for y in outputs)
        adapter.unmerge()
        return Cell(identity, trains, error, torch.equal(model(x), y1), file)


def layer_table(methods: list[str], layers: list[str]) -> str:
    lines = ["| layer | " + " | ".join(f"`{m}`" for m in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm and lazy modules announce themselves
        for layer in layers:
            cells = [str(measure(method, layer, Path(folder))) for method in methods]
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def eg3d_table(methods: list[str]) -> str:
    """Layers, parameters and file size of every method at rank 1 on EG3D's synthesis and super-resolution."""
    generator = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"])
    targets = ["backbone.synthesis.*", "superresolution.*"]
    lines = ["| method | layers | parameters | file, float32 | file, float16 |", "|---|--:|--:|--:|--:|"]
    rows: list[tuple[str, str, dict[str, int]]] = [(f"`{m}`", m, {}) for m in methods]
    if "para" in methods:
        rows.insert(methods.index("para") + 1, ("`para`, `min_out=0`", "para", {"min_out": 0}))
    with tempfile.TemporaryDirectory() as folder:
        for title, method, options in rows:
            rank = 1 if convlora.METHODS[method].default_rank else None
            adapter = convlora.inject(generator, method, rank, targets=targets, **options)
            sizes = []
            for dtype in (torch.float32, torch.float16):
                size = adapter.save(Path(folder) / "a.safetensors", dtype).stat().st_size / 1000
                sizes.append(f"{size:,.0f} kB" if size < 1000 else f"{size / 1000:,.1f} MB")
            lines.append(f"| {title} | {len(adapter.layers)} | {adapter.num_parameters:,} | {' | '.join(sizes)} |")
            adapter.remove()
    return "\n".join(lines)


def page(methods: list[str], layers: list[str], with_eg3d: bool) -> str:
    text = f"""<!-- Written by docs/make_methods_table.py; do not edit. -->

Each cell was run: rank {RANK} (SVDiff and full: everything), float64 unless the row says otherwise. The number is the
**merge error**, the largest difference of the merged output to the unmerged one, computed with the weight path and,
where there is one, with the low-rank path, over the largest output. It stands alone where all of these hold: at
injection the output is that of the base **bit for bit**; training lowers a loss and moves every tensor; `unmerge()`
gives back the unmerged output bit for bit; so does saving, and loading on a fresh base. Otherwise the cell names what
does not hold. `para` runs with `warmup=1`. *Refused*: an error says why (the two layouts
kept for comparison know square 2-D kernels only, and ranks up to min(out, in)). *Left out*: too few rows for PaRa's
default `min_out=4`.

{layer_table(methods, layers)}
"""
    if with_eg3d:
        text += f"""
Rank 1 on the full-size EG3D generator (`backbone.synthesis.*`, `superresolution.*`: 52 layers; `svdiff` and `full` have
no rank). Sizes are those of files that were written.

{eg3d_table(methods)}
"""
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "methods_table.md")
    parser.add_argument("--methods", default=",".join(convlora.METHODS), help="comma-separated")
    parser.add_argument("--layers", help="comma-separated")
    parser.add_argument("--no-eg3d", action="store_true", help="without the full-size generator")
    arguments = parser.parse_args()
    layers = arguments.layers.split(",") if arguments.layers else list(LAYERS)
    text = page(arguments.methods.split(","), layers, not arguments.no_eg3d)
    with convlora.files.replacing(arguments.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
