"""One training step (forward + backward) of whole generators: frozen, in full, LoRA, LoRA with W₀ + BA materialised.

python benchmarks/networks.py [--only eg3d stylegan2-256] [--batch 1 4] [--rank 1 4 16 64] [--device cuda]

"lora" is `path="auto"`, "materialised" `path="weight"`. The input needs a gradient in all of them, so the frozen step
is one of inverting photos. Times are medians; ratios are medians over rounds of the ratio within one round.

Floor. A convolution of x (N, i, positions) with a weight of o·i·k² values takes M = N·positions·o·i·k²
multiplications. Frozen: 2 M, the forward and grad_x. Full: 3 M, with grad_W, so frozen / full = 0.67 at best.
Materialised: 3 M and 3·r·o·i·k² for BA and the projections of grad_W, whose o·i·k² values are written and read.
LoRA of rank r: 2 M, and for the factors N·positions·r·(i·k² + o) twice: 4 products in all, which read x twice and
grad_y twice; and r·o·i·k² with two passes over the weight, in either direction, where the weights are summed.
For o = i = 512, k = 3, r = 1 that is 0.2 % of M: the rest of the distance to frozen is bytes and calls.

"× count", "× bytes", "× calls" and "× count of full" are those ratios for the operations that really ran:
multiplications of convolutions (the FIR filters' included) and matrix products, bytes that all operations read and
write, if each reads its tensors once, and the operations themselves. A step far above all of them spends its time on
something else.
"""

from __future__ import annotations

from functools import partial

import _common as bench
from _cases import NETWORKS, VARIANTS, step, trainables

DEFAULT = ("eg3d", "stylegan2-256", "dcgan")
COLUMNS = {
    "network": -14, "batch": 5, "rank": 4, "variant": -12, "ms": 9, "× frozen": 8, "× count": 8, "× bytes": 8,
    "× calls": 8, "× full": 8, "× count of full": 15,
}  # fmt: skip


def measure(name: str, batch: int, rank: int, rounds: int, device: str) -> list[bench.Row]:
    """A row per variant."""
    case = NETWORKS[name](batch)
    network, x = case.network.to(device), case.x.to(device).requires_grad_()
    models = {variant: make(network, rank) for variant, make in VARIANTS.items()}
    steps = {variant: partial(step, model, x) for variant, model in models.items()}
    times = bench.interleaved(steps, rounds, device)
    counts = {variant: bench.count(action) for variant, action in steps.items()}
    rows = []
    for variant in VARIANTS:
        row: bench.Row = {"network": name, "batch": batch, "rank": rank, "variant": variant}
        row |= {"trainables": trainables(models[variant]), "ms": bench.milliseconds(times[variant])}
        row |= counts[variant]._asdict() | {"seconds": times[variant]}
        for reference in ("frozen", "full"):
            own, its = counts[variant], counts[reference]
            row[f"of_{reference}"] = bench.ratio(times, variant, reference)
            row[f"of_{reference}_by_count"] = own.multiplications / its.multiplications
            row[f"of_{reference}_by_bytes"] = own.bytes / its.bytes
            row[f"of_{reference}_by_calls"] = own.calls / its.calls
        rows.append(row)
        bench.line(
            [name, batch, rank, variant, row["ms"], row["of_frozen"], row["of_frozen_by_count"],
             row["of_frozen_by_bytes"], row["of_frozen_by_calls"], row["of_full"], row["of_full_by_count"]], COLUMNS,
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = bench.arguments(__doc__, rounds=5)
    bench.add_cases(parser, NETWORKS, DEFAULT)
    options = parser.parse_args(argv)
    bench.prepare(options)
    told = bench.environment(options)
    bench.heading(told)
    bench.header(COLUMNS)
    rows = [row for case in bench.cases(options) for row in measure(*case, options.rounds, options.device)]
    label = "{network}, batch {batch}, rank {rank}: {variant}"
    bench.write(options.out, "networks", told, rows, label, "of_frozen", "time of a step relative to frozen weights")


if __name__ == "__main__":
    main()
