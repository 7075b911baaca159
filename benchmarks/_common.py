"""What the programs of this folder share: interleaved timing, counts of the arithmetic, a table, JSON and a plot."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import convlora
from convlora.files import replacing

Action = Callable[[], object]
Row = dict[str, Any]

# ---- command line


def arguments(doc: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every program; `doc` is its docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, …")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of all variants (default {rounds})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, on the CPU")
    clocks = "wall (default), or cpu: this process's own time on all cores, for a machine that others use too"
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=clocks)
    fresh = "on the CPU, without convlora.prepare_cpu: tensors get fresh memory and denormal numbers stay"
    parser.add_argument("--fresh-memory", action="store_true", help=fresh)
    folder = "for JSON and plot (default benchmarks/results, on a GPU results/cuda in it)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=folder)
    return parser


def add_cases(parser: argparse.ArgumentParser, names: Iterable[str], default: Sequence[str], batch: int = 1) -> None:
    """The options of programs that measure every network of some at every batch size and rank."""
    parser.add_argument("--only", nargs="+", choices=names, default=default, help=f"default {' '.join(default)}")
    parser.add_argument("--batch", nargs="+", type=int, default=[batch])
    parser.add_argument("--rank", nargs="+", type=int, default=[1])


def cases(options: argparse.Namespace) -> Iterable[tuple[str, int, int]]:
    """(network, batch, rank), in the order of the command line."""
    return product(options.only, options.batch, options.rank)


def prepare(options: argparse.Namespace) -> None:
    """Folder, threads, seed, the clock of `seconds`, and what `convlora.prepare_cpu` sets, for all variants alike."""
    device = options.device.partition(":")[0]
    options.out = options.out or Path(__file__).parent / "results" / ("" if device == "cpu" else device)
    torch.set_num_threads(options.threads)
    if not options.fresh_memory:
        convlora.prepare_cpu()
    torch.manual_seed(0)
    global _clock
    _clock = time.process_time if options.clock == "cpu" else time.perf_counter


# ---- time

_clock = time.perf_counter


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(action: Action, device: str) -> float:
    synchronize(device)
    start = clock()
    action()
    synchronize(device)
    return clock() - start


def clock() -> float:
    """Seconds of the clock that `--clock` chose, from anywhere."""
    return _clock()


def interleaved(
    actions: Mapping[str, Action], rounds: int, device: str, between: Action = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each action in each round; `between` runs before each, untimed.

    All run once per round, and every round begins with another one, so that neither a machine whose speed drifts nor
    what the one before left in the caches decides. A first round, which meets cold code, is not counted.
    """
    names = list(actions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            between()
            taken = seconds(actions[name], device)
            if turn:
                times[name].append(taken)
    return times


def milliseconds(times: Sequence[float]) -> float:
    return 1000 * statistics.median(times)


def ratio(times: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Median over rounds of the action's time divided by the reference's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


# ---- the floor


class Counts(NamedTuple):
    """Multiplications of convolutions and matrix products; bytes that all operations read and write, and their number.

    Each operation is at least one kernel on a GPU, where a small one costs what it takes to start it.
    """

    multiplications: int
    bytes: int
    calls: int


class _Counter(TorchDispatchMode):
    """Operations as they reach the kernels, of the backward too. Views cost nothing; others read each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0
        self.bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket not in _MOVES_NOTHING:
            self.bytes += sum(map(_bytes, _tensors(args))) + sum(map(_bytes, _tensors(out)))
            self.calls += 1
            self.multiplications += _multiplications(func.overloadpacket, args, out)
        return out


_MOVES_NOTHING = {
    getattr(torch.ops.aten, name) for name in ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty")
}


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [tensor for item in found for tensor in _tensors(item)] if isinstance(found, tuple | list) else []


def _bytes(tensor: torch.Tensor) -> int:
    """Expanded tensors have fewer than their shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _multiplications(packet: Any, args: Any, out: Any) -> int:
    aten = torch.ops.aten
    if packet is aten.convolution:
        x, weight, transposed = args[0], args[1], args[6]
        return _of_convolution(x if transposed else out, weight)
    if packet is aten.convolution_backward:
        grad_y, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        return _of_convolution(x if transposed else grad_y, weight) * (wanted[0] + wanted[1])
    if packet in (aten.mm, aten.bmm):
        return args[0].numel() * args[1].shape[-1]
    if packet in (aten.addmm, aten.baddbmm):
        return args[1].numel() * args[2].shape[-1]
    return 0


def _of_convolution(grid: torch.Tensor, weight: torch.Tensor) -> int:
    return len(grid) * grid[0, 0].numel() * weight.numel()


def count(action: Action) -> Counts:
    with _Counter() as counter:
        action()
    return Counts(counter.multiplications, counter.bytes, counter.calls)


def multiplication_rate(device: str, side: int = 1024, rounds: int = 5) -> float:
    """Multiplications per second of this machine's float32 matrix product: the best of some."""
    a, b = torch.randn(2, side, side, device=device)
    return side**3 / min(seconds(lambda: a @ b, device) for _ in range(rounds + 1))


def copy_rate(device: str, megabytes: int = 64, rounds: int = 5) -> float:
    """Bytes read and written per second by a copy too large for the caches: the best of some."""
    a = torch.ones(megabytes << 18, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / min(seconds(lambda: b.copy_(a), device) for _ in range(rounds + 1))


# ---- results


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What a result was measured on and with."""
    gpu = options.device.startswith("cuda")
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(options.device) if gpu else "cpu",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "clock": options.clock,
        "fresh_memory": options.fresh_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "convlora": convlora.__version__,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def version(package: str) -> str | None:
    """Of an installed distribution; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def heading(told: Mapping[str, Any]) -> None:
    """The line above a table."""
    where = told["device"] if told["device"] != "cpu" else f"{told['cpu']}, {told['threads']} threads"
    clock = "" if told["clock"] == "wall" else ", CPU time"
    memory = ", fresh memory" if told["fresh_memory"] else ""
    print(f"torch {told['torch']}, {where}; {told['rounds']} rounds{clock}{memory}, {told['date']}", flush=True)


def header(columns: Mapping[str, int]) -> None:
    """The names of a table's columns, each with its width; a negative one is of text, which goes to the left."""
    line(list(columns), columns)


def line(values: Sequence[object], columns: Mapping[str, int]) -> None:
    """One line of a table, printed as soon as it is known; None is "–". The last value may be longer."""
    texts = [_text(value) for value in values]
    cells = [text.ljust(-width) if width < 0 else text.rjust(width) for text, width in zip(texts, columns.values())]
    print("  ".join(cells).rstrip(), flush=True)


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(out: Path, name: str, told: Mapping[str, Any], rows: Sequence[Row], label: str, key: str, what: str) -> None:
    """`out/name.json` with all that was measured, and `out/name.png`: a bar for each row that has `key`.

    Args:
        label: a format string of the row's keys that names its bar.
        what: the ratio, in words.
    """
    with replacing(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({"environment": told, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    bars = {label.format(**row): row[key] for row in rows if row.get(key) is not None}
    drawn = plot(out / f"{name}.png", bars, what, f"torch {told['torch']}, {told['device']}, {told['date']}")
    print(f"\n{out / name}.json{' and .png' if drawn else '; no plot without matplotlib: pip install matplotlib'}")


def plot(path: Path, bars: Mapping[str, float], what: str, title: str) -> bool:
    """Horizontal bars with their values, the first on top, and a line at 1; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.28 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.barh(list(bars), list(bars.values()), color="#4878a8")
    axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.invert_yaxis()
    low, high = min(bars.values(), default=0), max(bars.values(), default=0)
    if high > 50 * low > 0 and high > 1:  # shares of a whole stay as they are
        axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.set_xlabel(what)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True
