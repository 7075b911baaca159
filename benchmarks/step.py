"""One training step (forward + backward) of a layer: frozen, in full, LoRA on the weight and on the low-rank path.

python benchmarks/step.py [--device cuda] [--pairs 7]

The variants are interleaved and every figure is the median over rounds of its time divided by that of full
fine-tuning in the same round, so that a machine whose speed drifts does not decide.

Floor. By multiplications, frozen takes 2/3 of full fine-tuning, and so does the low-rank path but for 2·r·(1/i + 1/o)
of a convolution or less; the weight path takes as many as full fine-tuning (see networks.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator

import _common as bench
import torch
from torch import nn

import convlora
from convlora.integrations.stylegan2.layers import SynthesisLayer

MODULATED = ((512, 8), (512, 16), (512, 32), (256, 64), (128, 32), (128, 128), (64, 64), (32, 128))  # channels, side
PLAIN = ((512, 8), (512, 16), (512, 32), (256, 32), (128, 64), (64, 64), (32, 128))


def cases() -> Iterator[tuple[str, nn.Module, tuple[torch.Tensor, ...]]]:
    """Name, layer and inputs, built one after the other."""
    for c, s in MODULATED:
        yield f"modulated {c} ch {s}²", SynthesisLayer(c, c, 512, s), (torch.randn(4, c, s, s), torch.randn(4, 512))
    for c, s in PLAIN:
        yield f"Conv2d {c} ch {s}²", nn.Conv2d(c, c, 3, padding=1), (torch.randn(4, c, s, s),)
    yield "Linear 512, 8 rows", nn.Linear(512, 512), (torch.randn(8, 512),)
    yield "Linear 1024, 4096 rows", nn.Linear(1024, 1024), (torch.randn(4096, 1024),)


def variants(layer: nn.Module) -> dict[str, nn.Module]:
    models = {name: copy.deepcopy(layer) for name in ("full", "frozen", "weight", "low_rank")}
    models["frozen"].requires_grad_(False)
    convlora.inject_lora(models["weight"], rank=1, targets=[""], path="weight")
    convlora.inject_lora(models["low_rank"], rank=1, targets=[""], path="low_rank")
    return models


def step(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Seconds of one forward and backward; the input needs a gradient, as it does inside a network."""
    x = inputs[0].detach().requires_grad_()
    extra = {"noise_mode": "const", "fused_modconv": False} if isinstance(model, SynthesisLayer) else {}
    return bench.seconds(lambda: model(x, *inputs[1:], **extra).sum().backward(), str(x.device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = {}
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads; time relative to full fine-tuning")
    print(f"{'layer':26}{'frozen':>10}{'weight':>10}{'low_rank':>10}")
    torch.manual_seed(0)
    for name, layer, tensors in cases():
        models = variants(layer.to(options.device))
        inputs = tuple(t.to(options.device) for t in tensors)
        for model in models.values():
            step(model, inputs)
        rounds = [{key: step(model, inputs) for key, model in models.items()} for _ in range(options.pairs)]
        ratios = {key: statistics.median(r[key] / r["full"] for r in rounds) for key in models if key != "full"}
        figures[name] = ratios
        print(f"{name:26}" + "".join(f"{ratios[key]:10.2f}" for key in ("frozen", "weight", "low_rank")), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "device": options.device, "ratios": figures}, file, indent=2)


if __name__ == "__main__":
    main()
