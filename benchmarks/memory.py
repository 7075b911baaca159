"""Peak memory of one training step (forward + backward), each variant in a process of its own.

python benchmarks/memory.py [--only eg3d 256ch-32 …] [--batch 1] [--rank 1] [--device cuda]

The variants are those of `networks.py` and `peers.py`. "peak MB" is what a step holds at its worst above what was
there before it (weights, input): activations, gradients, temporaries. One step runs before, so that what libraries
keep for ever is there. Adam would add two values per trainable. On CUDA it is `max_memory_allocated`.

On a CPU it is the largest running total of the allocations and frees that torch's profiler records. Those are the
allocator's own: scratch memory inside kernels and copies in oneDNN's layouts are among them, which neither hooks nor a
dispatch mode see. The process's `ru_maxrss` follows the allocator's habits (pages it keeps, or returns, at will) more
than the step; by how much it grew over the first step is given as "rss MB".

Floor. At the end of the forward a step holds what autograd saved: each layer's input, N·i·positions values, once; at
the end of the backward all gradients, one value per trainable. "floor MB" is the larger of the two, what autograd
saved counted by its own hooks. A LoRA needs to save nothing that the frozen step does not; its gradients are
r·(o + i·k²) values per layer where full fine-tuning's are o·i·k². The materialised way also saves W₀ + BA.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import _common as bench
import torch
from _cases import NETWORKS, PLAIN, VARIANTS, step, trainables
from _peers import PEERS, Refused, versions

from convlora.integrations.eg3d.batches import saved_for_backward

DEFAULT = ("eg3d", "stylegan2-256", "dcgan", "512ch-16", "256ch-32", "128ch-64")
CASES = PLAIN | NETWORKS
COLUMNS = {
    "network": -14, "batch": 5, "rank": 4, "variant": -12, "trainables": 11, "peak MB": 9, "rss MB": 8,
    "floor MB": 8, "× frozen": 8, "× PEFT": 8, "× LoCon": 8,
}  # fmt: skip


def peak_of_cpu(action: bench.Action) -> int:
    """The most bytes that `action` held at once, of those that it allocated; read from the profiler's trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    held: dict[int, int] = {}
    total = peak = 0
    for event in events:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            held[address] = size
            total += size
            peak = max(peak, total)
        else:
            total -= held.pop(address, 0)  # what was there before is not counted
    return peak


def peak_of_cuda(action: bench.Action, device: str) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def saved(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd saves in the forward, each tensor's memory once, without those of the model and of x."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    found = saved_for_backward(lambda: model(x))
    return sum(size for address, size in found.items() if address not in given)


def resident() -> int:
    """The most bytes this process has had resident so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def measure(name: str, variant: str, batch: int, rank: int, device: str) -> bench.Row:
    """One row, of the one step this process is for."""
    case = CASES[name](batch)
    row: bench.Row = {"network": name, "batch": batch, "rank": rank, "variant": variant}
    try:
        model = {**VARIANTS, **PEERS}[variant](case.network, rank).to(device)
    except Refused as error:
        return row | {"refused": str(error)}
    x = case.x.to(device).requires_grad_()
    del case
    action = partial(step, model, x)
    before = resident()
    action()
    grown = resident() - before
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    peak = peak_of_cuda(action, device) if device.startswith("cuda") else peak_of_cpu(action)
    learnt = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = {"saved": saved(model, x), "gradients": learnt}
    return row | {"trainables": trainables(model), "bytes": peak, "resident": grown, **kept}


def elsewhere(options: argparse.Namespace, *one: str) -> bench.Row:
    """`measure` in a new process."""
    command = [
        sys.executable, __file__, "--one", *one, "--device", options.device, "--threads", str(options.threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[bench.Row]) -> None:
    """Complete and print the rows of one network, batch and rank."""
    bytes_of = {row["variant"]: row["bytes"] for row in rows if "bytes" in row}
    for row in rows:
        head = [row[key] for key in ("network", "batch", "rank", "variant")]
        if "refused" in row:
            bench.line([*head, f"refused: {row['refused']}"], COLUMNS)
            continue
        for reference in bytes_of:
            row[f"of_{reference}"] = row["bytes"] / bytes_of[reference]
        row["floor"] = max(row["saved"], row["gradients"])
        bench.line(
            [*head, row["trainables"], row["bytes"] / 1e6, row["resident"] / 1e6, row["floor"] / 1e6,
             row["of_frozen"], row.get("of_peft"), row.get("of_locon")], COLUMNS,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = bench.arguments(__doc__, rounds=1)
    bench.add_cases(parser, CASES, DEFAULT)
    parser.add_argument("--one", nargs=4, metavar=("NETWORK", "VARIANT", "BATCH", "RANK"), help=argparse.SUPPRESS)
    parser.set_defaults(fresh_memory=True)  # what was kept of the model's making would not grow
    options = parser.parse_args(argv)
    bench.prepare(options)
    if options.one:
        name, variant, batch, rank = options.one
        print(json.dumps(measure(name, variant, int(batch), int(rank), options.device)))
        return
    told = bench.environment(options) | versions()
    bench.heading(told)
    bench.header(COLUMNS)
    rows = []
    for name, batch, rank in bench.cases(options):
        variants = [*VARIANTS, *(PEERS if name in PLAIN else ())]
        found = [elsewhere(options, name, variant, str(batch), str(rank)) for variant in variants]
        table(found)
        rows += found
    label = "{network}, batch {batch}, rank {rank}: {variant}"
    bench.write(
        options.out, "memory", told, rows, label, "of_frozen", "peak memory of a step relative to frozen weights"
    )


if __name__ == "__main__":
    main()
