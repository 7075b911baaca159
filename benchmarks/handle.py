"""Handling a finished adapter: merge, unmerge, swap (into a compiled generator too), save, load; importing convlora.

python benchmarks/handle.py [--config ffhq512-128] [--rank 1] [--rounds 7] [--device cuda]

A rank-r adapter on all layers of EG3D's backbone and super-resolution, random weights. Each round does everything
once; times are medians, with the largest beside them, in which a slow disk's fsync shows.

"compiled swap" is a swap while these networks run under `torch.compile`. It counts the graphs that dynamo compiles
after the swaps (0 is right), and checks that the picture changed; how many graphs there were at first is printed too,
with what broke them where it was more than one. Guards do not depend on the
backend, so "eager", the default on a CPU, counts them in less time than "inductor", the default on CUDA.

Floor. merge reads each W₀ and writes a weight; unmerge puts the old tensor back and moves nothing; a swap reads and
writes the adapter's values; save and load write and read its file (save waits for the disk, load compares a sample of
the base's values). "floor ms" is these bytes at the rate of this machine's memory copy, "× floor" the time as a
multiple of it: what is above is per-layer work of Python, a few microseconds for each of some 50 layers and the disk.
Importing is held against importing torch, in new processes, interleaved.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _common as bench
import torch
from _cases import BackboneAndSR, randomize
from torch._dynamo.utils import counters

import convlora
from convlora.integrations import eg3d
from convlora.integrations.eg3d.personalize import TARGETS

COLUMNS = {"action": -22, "ms": 9, "largest": 9, "MB": 7, "floor ms": 9, "× floor": 8}


class Subject:
    """A generator with an adapter, its file, and the tensors of another one."""

    def __init__(self, G: eg3d.TriPlaneGenerator, rank: int, folder: Path) -> None:
        limits = {row.name: row.max_rank for row in convlora.adaptable(G, list(TARGETS)) if row.max_rank < rank}
        self.G = G
        self.adapter = convlora.inject_lora(G, rank, targets=list(TARGETS), ranks=limits)
        randomize(self.adapter.parameters())
        self.file = self.adapter.save(folder / "one.safetensors")
        self.tensors = {key: tensor.clone() for key, tensor in self.adapter.state_dict().items()}
        randomize(self.adapter.parameters(), 0.1)
        self.other = self.adapter.save(folder / "other.safetensors")

    def load(self) -> None:
        self.adapter = convlora.load_adapter(self.G, self.file)

    def actions(self) -> dict[str, Callable[[], object]]:
        """In an order in which each can follow the one before."""
        return {
            "swap, tensors": lambda: self.adapter.swap(self.tensors),
            "swap, file": lambda: self.adapter.swap(self.other),
            "merge": lambda: self.adapter.merge(),
            "unmerge": lambda: self.adapter.unmerge(),
            "save": lambda: self.adapter.save(self.file),
            "remove": lambda: self.adapter.remove(),
            "load": self.load,
        }

    def moved(self) -> dict[str, int]:
        """The bytes that each action cannot do without moving."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        slots = self.adapter.record.slots(self.G).values()
        base = sum(slot.tensor.numel() * slot.tensor.element_size() for slot in slots)
        file = self.file.stat().st_size
        return {
            "swap, tensors": 2 * own, "swap, file": file + own, "merge": 2 * base + own, "save": own + file,
            "load": file + own,
        }  # fmt: skip


def handled(subject: Subject, rounds: int, device: str) -> list[bench.Row]:
    moved, actions = subject.moved(), subject.actions()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            taken = bench.seconds(action, device)
            if turn:  # the first meets cold code
                times[name].append(taken)
    rate = bench.copy_rate(device)
    rows = []
    for name, found in times.items():
        row: bench.Row = {
            "action": name,
            "ms": bench.milliseconds(found),
            "largest_ms": 1000 * max(found),
            "seconds": found,
        }
        if name in moved:
            row |= {"bytes": moved[name], "floor_ms": 1000 * moved[name] / rate}
            row["of_floor"] = row["ms"] / row["floor_ms"]
        rows.append(row)
        bench.line(
            [name, row["ms"], row["largest_ms"], moved[name] / 1e6 if name in moved else None, row.get("floor_ms"),
             row.get("of_floor")], COLUMNS,
        )  # fmt: skip
    return rows


def compiled_swaps(subject: Subject, backend: str, rounds: int, device: str) -> bench.Row:
    """Swap two adapters in turn into the networks while they run compiled."""
    ws = torch.randn(1, subject.G.num_ws, subject.G.w_dim, device=device)
    torch._dynamo.reset()
    counters.clear()
    draw = torch.compile(BackboneAndSR(subject.G), backend=backend)
    sources = (subject.tensors, subject.other)
    images, times = [], []
    # where graphs break, each layer's forward is compiled by itself: past the limit they would run uncompiled
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=256):
        draw(ws)
        graphs, breaks = counters["stats"]["unique_graphs"], list(counters["graph_break"])
        for turn in range(max(2, rounds)):
            swap = partial(subject.adapter.swap, sources[turn % 2])
            times.append(bench.seconds(swap, device))
            images.append(draw(ws))
    if graphs == 0 or torch.equal(images[0], images[1]):
        raise SystemExit("the networks were not compiled, or do not draw what was swapped in")
    more = counters["stats"]["unique_graphs"] - graphs
    row = {"action": "compiled swap", "ms": bench.milliseconds(times), "largest_ms": 1000 * max(times)}
    bench.line([row["action"], row["ms"], row["largest_ms"]], COLUMNS)
    print(f"compiled ({backend}): {graphs} graphs before the swaps, {more} more after {len(times)} of them")
    for reason in breaks:
        print(f"  graph broken: {reason.splitlines()[0]}")
    return row | {"seconds": times, "backend": backend, "graphs": graphs, "breaks": breaks, "recompiled": more}


def imports(rounds: int) -> list[bench.Row]:
    """`import torch` and `import convlora` in new processes, by their own clocks."""
    timed = "import time; t = time.perf_counter(); import {0}; print(time.perf_counter() - t)"
    times: dict[str, list[float]] = {"torch": [], "convlora": []}
    for turn in range(rounds + 1):
        for name in times if turn % 2 else reversed(times):
            done = subprocess.run([sys.executable, "-c", timed.format(name)], capture_output=True, check=True)
            if turn:  # the first may find the files on the disk only
                times[name].append(float(done.stdout))
    rows = []
    for name, found in times.items():
        of_torch = statistics.median(a / b for a, b in zip(found, times["torch"], strict=True))
        row = {"action": f"import {name}", "ms": bench.milliseconds(found), "largest_ms": 1000 * max(found)}
        rows.append(row | {"of_floor": of_torch, "seconds": found})
        bench.line([row["action"], row["ms"], row["largest_ms"], None, None, of_torch], COLUMNS)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = bench.arguments(__doc__, rounds=7)
    parser.add_argument("--config", choices=eg3d.CONFIGS, default="ffhq512-128")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--backend", help="of torch.compile (default: inductor on CUDA, else eager)")
    options = parser.parse_args(argv)
    bench.prepare(options)
    told = bench.environment(options)
    bench.heading(told)
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS[options.config]).eval().requires_grad_(False).to(options.device)
    backend = options.backend or ("inductor" if options.device.startswith("cuda") else "eager")
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(G, options.rank, Path(folder))
        told["layers"], told["values"] = len(subject.adapter.layers), subject.adapter.num_parameters
        print(f"{options.config}, rank {options.rank}: {told['layers']} layers, {told['values']:,} values")
        bench.header(COLUMNS)
        rows = handled(subject, options.rounds, options.device)
        rows.append(compiled_swaps(subject, backend, options.rounds, options.device))
    rows += imports(options.rounds)
    what = "time relative to moving the bytes (importing: to importing torch)"
    bench.write(options.out, "handle", told, rows, "{action}", "of_floor", what)


if __name__ == "__main__":
    main()
