"""One person from an album to an adapter file, by the clock: photos read, anchors found, adapter tuned and saved.

python benchmarks/person.py [--photos 8 16 50] [--anchor-steps 25] [--steps 120]
python benchmarks/person.py --config ffhq512-128 --photos 50 --anchor-steps 500 --steps 500 --device cuda
python benchmarks/person.py --generator ffhq.pkl --album ALBUM --anchor-steps 500 --steps 2000 --device cuda

`--config` has random weights and photos, which take the time of real ones. Some steps of each stage run
before its clock starts.

Floor. A step of inversion at batch b runs the generator forward and its input's gradient back, a step of tuning the
same with the factors' gradients (`networks.py`); the renderer, not a matter of weights, is in both. "floor s" is what
the multiplications of the steps that ran would take at the rate of this machine's float32 matrix product, and "× floor"
the time spent as a multiple of it. Reading and saving have a floor of their files' bytes, which is next to nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import _common as bench
from _people import generator, networks, people_arguments, photos

import convlora
from convlora.integrations import eg3d
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.personalize import personalize

COLUMNS = {"photos": 6, "stage": -15, "seconds": 9, "share": 6, "ms/step": 9, "floor s": 9, "× floor": 8}


@contextlib.contextmanager
def timed(spent: dict[str, float], stage: str, device: str) -> Iterator[None]:
    bench.synchronize(device)
    start = bench.clock()
    yield
    bench.synchronize(device)
    spent[stage] = bench.clock() - start


def measure(options: argparse.Namespace, G: eg3d.TriPlaneGenerator, wanted: int, rate: float) -> list[bench.Row]:
    """A row per stage, and one of the whole."""
    known, device = networks(options), options.device
    spent: dict[str, float] = {}
    with timed(spent, "photos", device):
        album = photos(options, G, wanted)

    def invert(some: Photos, steps: int) -> Anchors:
        return eg3d.find_anchors(
            G, some, steps, init=known.encoder or "mean", perceptual=known.perceptual,
            batch_size=options.anchor_batch, progress=False,
        )  # fmt: skip

    def tune(steps: int) -> convlora.Adapter:
        return personalize(
            G, album, anchors, rank=options.rank, steps=steps, batch_size=options.batch, perceptual=known.perceptual,
            progress=False,
        )  # fmt: skip

    batch = album.first(options.anchor_batch)
    of_inversion = of_a_step(lambda steps: invert(batch, steps)) * len(album) / len(batch)
    with timed(spent, "anchors", device):
        anchors = invert(album, options.anchor_steps)
    of_tuning = of_a_step(lambda steps: tune(steps).remove())
    with timed(spent, "personalisation", device):
        adapter = tune(options.steps)
    with tempfile.TemporaryDirectory() as folder, timed(spent, "saving", device):
        adapter.save(Path(folder) / "me.safetensors")
    adapter.remove()

    steps = {
        "anchors": options.anchor_steps * math.ceil(len(album) / options.anchor_batch),
        "personalisation": options.steps,
    }
    floors = {
        "anchors": of_inversion * options.anchor_steps / rate,
        "personalisation": of_tuning * options.steps / rate,
    }
    spent["whole"], floors["whole"] = sum(spent.values()), sum(floors.values())
    rows = []
    for stage, taken in spent.items():
        row: bench.Row = {"photos": len(album), "stage": stage, "seconds": taken, "share": taken / spent["whole"]}
        if stage in steps:
            row |= {"steps": steps[stage], "ms_per_step": 1000 * taken / steps[stage]}
        if stage in floors:
            row |= {"floor_seconds": floors[stage], "of_floor": taken / floors[stage]}
        rows.append(row)
        bench.line(
            [len(album), stage, taken, f"{100 * row['share']:.0f} %", row.get("ms_per_step"), row.get("floor_seconds"),
             row.get("of_floor")], COLUMNS,
        )  # fmt: skip
    return rows


def of_a_step(run: Callable[[int], object]) -> int:
    """The multiplications of a step: what two have more than one."""
    one, two = (bench.count(partial(run, steps)).multiplications for steps in (1, 2))
    return two - one


def main(argv: list[str] | None = None) -> None:
    parser = bench.arguments(__doc__, rounds=1)
    people_arguments(parser)
    parser.add_argument("--photos", nargs="+", type=int, default=[8])
    parser.add_argument("--anchor-steps", type=int, default=25)
    parser.add_argument("--anchor-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=1)
    options = parser.parse_args(argv)
    bench.prepare(options)
    told = bench.environment(options)
    bench.heading(told)
    G = generator(options)
    rate = bench.multiplication_rate(options.device)
    bench.header(COLUMNS)
    rows = [row for wanted in options.photos for row in measure(options, G, wanted, rate)]
    label = "{photos} photos: {stage}"
    bench.write(options.out, "person", told, rows, label, "share", "share of the whole person's time")


if __name__ == "__main__":
    main()
