"""Adapter files of a full-size EG3D generator: their size, and the time to save and to load one.

python benchmarks/files.py [--methods lora para lidb] [--rounds 15] [--device cuda]

The generator has the layers of ffhq512-128 (31 million values, random) and the adapter all 52 layers of the
tri-plane and super-resolution networks at rank 1. Times are medians; loading includes the check of the base, and
saving the fsync, so that a slow disk shows in its maximum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import convlora
from convlora.integrations import eg3d

TARGETS = ["backbone.synthesis.*", "superresolution.*"]


def timed(action: Callable[[], object], after: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each round of `action`; `after` undoes it, untimed."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        action()
        times.append(1000 * (time.perf_counter() - start))
        after()
    return times[1:]  # the first one meets cold code


def measure(G: torch.nn.Module, method: str, dtype: torch.dtype, rounds: int, folder: Path) -> dict[str, float]:
    path = folder / f"{method}.safetensors"
    adapter = convlora.inject(G, method, 1, targets=TARGETS)
    saves = timed(lambda: adapter.save(path, dtype=dtype), lambda: None, rounds)
    layers, values = len(adapter.layers), adapter.num_parameters
    adapter.remove()
    loads = timed(lambda: convlora.load_adapter(G, path), lambda: convlora.Adapter.of(G).remove(), rounds)
    return {
        "layers": layers, "values": values, "bytes": path.stat().st_size,
        "save_ms": statistics.median(saves), "save_max_ms": max(saves),
        "load_ms": statistics.median(loads), "load_max_ms": max(loads),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lora"], help="of convlora.METHODS (default lora)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    torch.manual_seed(0)
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"]).eval().requires_grad_(False).to(options.device)
    total = sum(p.numel() for p in G.parameters())
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; {total:,} base values")
    print(
        f"{'adapter':20}{'layers':>7}{'values':>10}{'bytes':>10}{'save ms':>10}{'(max)':>8}{'load ms':>10}{'(max)':>8}"
    )
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            for dtype in (torch.float32, torch.float16):
                name = f"{method} {str(dtype)[6:]}"
                f = figures[name] = measure(G, method, dtype, options.rounds, Path(folder))
                print(
                    f"{name:20}{f['layers']:7}{f['values']:10,}{f['bytes']:10,}{f['save_ms']:10.1f}"
                    f"{f['save_max_ms']:8.1f}{f['load_ms']:10.1f}{f['load_max_ms']:8.1f}",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "device": options.device, "figures": figures}, file, indent=2)


if __name__ == "__main__":
    main()
