"""One training step of plain convolutional networks with LoRA: convlora, Hugging Face PEFT, LyCORIS LoCon.

python benchmarks/peers.py [--only 512ch-16 256ch-32 128ch-64 dcgan] [--batch 4] [--rank 1 4 16 64] [--device cuda]

Four 3×3 convolutions with ReLU between them, and a DCGAN. The three give every layer a LoRA of the same rank with
alpha = rank and no dropout, and are otherwise as they come: PEFT's `LoraConfig`, LyCORIS's `create_lycoris` with its
default algorithm, LoCon. Frozen weights and full fine-tuning are the references. What a library cannot adapt is
printed as refused, in its own words.

Floor. With M = N·positions·o·i·k² multiplications of one convolution: frozen 2 M, full 3 M. A LoRA needs 2 M and its
four products to or from r channels, 2·N·positions·r·(i·k² + o), which read x twice and grad_y twice. PEFT runs these
as two more convolutions and adds outputs: about the same multiplications, and the output's bytes several times more.
LyCORIS multiplies ΔW out and runs a whole second convolution with it: 5 M.

"× PEFT" and "× LoCon" are medians over rounds of the time within one round; "× count" and "× bytes" are relative to
frozen weights, of the operations that really ran (see `networks.py`).
"""

from __future__ import annotations

from functools import partial

import _common as bench
from _cases import PLAIN, VARIANTS, step, trainables
from _peers import PEERS, Refused, versions

DEFAULT = ("512ch-16", "256ch-32", "128ch-64", "dcgan")
COLUMNS = {
    "network": -9, "batch": 5, "rank": 4, "variant": -8, "ms": 9, "× frozen": 8, "× count": 8, "× bytes": 8,
    "× PEFT": 8, "× LoCon": 8,
}  # fmt: skip
WAYS = {name: VARIANTS[name] for name in ("frozen", "full", "lora")} | PEERS


def measure(name: str, batch: int, rank: int, rounds: int, device: str) -> list[bench.Row]:
    """A row per variant; of those refused, with their message."""
    case = PLAIN[name](batch)
    network, x = case.network.to(device), case.x.to(device).requires_grad_()
    models, refused = {}, {}
    for variant, make in WAYS.items():
        try:
            models[variant] = make(network, rank)
        except Refused as error:
            refused[variant] = str(error)
    steps = {variant: partial(step, model, x) for variant, model in models.items()}
    times = bench.interleaved(steps, rounds, device)
    counts = {variant: bench.count(action) for variant, action in steps.items()}
    rows = []
    for variant in WAYS:
        row: bench.Row = {"network": name, "batch": batch, "rank": rank, "variant": variant}
        rows.append(row)
        if variant in refused:
            row["refused"] = refused[variant]
            bench.line([name, batch, rank, variant, f"refused: {refused[variant]}"], COLUMNS)
            continue
        own, its = counts[variant], counts["frozen"]
        row |= {"trainables": trainables(models[variant]), "ms": bench.milliseconds(times[variant])}
        row |= own._asdict() | {"seconds": times[variant]}
        for reference in WAYS:
            row[f"of_{reference}"] = bench.ratio(times, variant, reference) if reference in times else None
        row |= {"by_count": own.multiplications / its.multiplications, "by_bytes": own.bytes / its.bytes}
        bench.line(
            [name, batch, rank, variant, row["ms"], row["of_frozen"], row["by_count"], row["by_bytes"],
             row["of_peft"], row["of_locon"]], COLUMNS,
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = bench.arguments(__doc__, rounds=7)
    bench.add_cases(parser, PLAIN, DEFAULT, batch=4)
    options = parser.parse_args(argv)
    bench.prepare(options)
    told = bench.environment(options) | versions()
    bench.heading(told)
    print(f"peft {told['peft']}, lycoris-lora {told['lycoris-lora']}")
    bench.header(COLUMNS)
    rows = [row for case in bench.cases(options) for row in measure(*case, options.rounds, options.device)]
    label = "{network}, batch {batch}, rank {rank}: {variant}"
    bench.write(options.out, "peers", told, rows, label, "of_frozen", "time of a step relative to frozen weights")


if __name__ == "__main__":
    main()
