"""Recompressing the sum of two adapters to rank r: QR of the factors against decomposing the multiplied-out sum.

python benchmarks/compose.py [--device cuda] [--pairs 7]

The two are interleaved, and the factor is the median over rounds of their times' ratio in the same round. Both give
the same best approximation; the difference of their errors is printed beside it.

Floor. Of factors of rank R on an out × cols matrix, QR of both takes (out + cols)·R² multiplications; the singular
value decomposition of the sum multiplied out takes out²·cols (out ≤ cols), and R·out·cols to form it.
"""

from __future__ import annotations

import argparse
import json
import statistics

import _common as bench
import torch

from convlora import lowrank
from convlora.lowrank import Factors

SHAPES = ((512, 4608), (512, 512), (256, 2304), (128, 1152), (3, 512))  # EG3D's 3×3 layers, an affine, a ToRGB
RANKS = (1, 4, 16)  # of each of the two adapters, and of the result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    figures = {}
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads; medians of {options.pairs} rounds")
    print(f"{'matrix':14}{'rank':>5}{'QR, ms':>10}{'dense SVD, ms':>15}{'factor':>9}{'error differs by':>19}")
    for out, cols in SHAPES:
        for rank in RANKS:
            if 2 * rank > min(out, cols):
                continue
            left, right = torch.randn(out, 2 * rank), torch.randn(2 * rank, cols)
            both = Factors(left.to(options.device), right.to(options.device))
            ways = {
                "qr": lambda: lowrank.truncated(lowrank.svd(both), rank),  # noqa: B023
                "dense": lambda: lowrank.truncated(lowrank.svd(lowrank.dense(both)), rank),  # noqa: B023
            }
            errors = {name: way()[1] for name, way in ways.items()}  # the first call of each is not timed
            rounds = [
                {name: bench.seconds(way, options.device) for name, way in ways.items()} for _ in range(options.pairs)
            ]
            ms = {name: 1000 * statistics.median(r[name] for r in rounds) for name in ways}
            factor = statistics.median(r["dense"] / r["qr"] for r in rounds)
            off = abs(errors["qr"] - errors["dense"]) / errors["dense"]
            figures[f"{out}x{cols} rank {rank}"] = {**ms, "factor": factor, "error_difference": off}
            print(
                f"{f'{out} × {cols}':14}{rank:5}{ms['qr']:10.2f}{ms['dense']:15.1f}{factor:8.0f}×{off:19.1e}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "device": options.device, "ms": figures}, file, indent=2)


if __name__ == "__main__":
    main()
