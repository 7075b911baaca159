"""Photos inverted per minute by `find_anchors`, at several batch sizes, and the losses each ends with.

python benchmarks/anchors.py [--batch 1 8 50] [--photos 50] [--steps 10]
python benchmarks/anchors.py --generator ffhq.pkl --album ALBUM --steps 500 --rounds 1 --device cuda

The same photos, the same number of steps, and every batch size once per round. Every photo has random numbers of its
own, so the losses should be the same: "differs" is the mean over photos of the relative difference from the first
batch size, and the last line gives the same of two seeds, to compare.

Floor. Photos are independent: the multiplications per photo are the same at every batch size ("× count" says what
ran), so by arithmetic alone batches gain nothing. What they save is fixed per call: reading the weights once instead
of once per photo ("× bytes"), launching each operation, and, on a GPU, filling all of it. "floor" is the photos per
minute that the multiplications alone would allow at the rate of this machine's float32 matrix product.
"""

from __future__ import annotations

from functools import partial

import _common as bench
import torch
from _people import generator, networks, people_arguments, photos
from torch import Tensor

from convlora.integrations import eg3d

COLUMNS = {
    "batch": 5, "photos": 6, "photos/min": 10, "floor": 8, "× first": 8, "× count": 8, "× bytes": 8, "loss": 8,
    "differs": 8,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = bench.arguments(__doc__, rounds=2)
    people_arguments(parser)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 50])
    parser.add_argument("--photos", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(argv)
    bench.prepare(options)
    told = bench.environment(options)
    bench.heading(told)
    G = generator(options)
    album, known = photos(options, G, options.photos), networks(options)
    losses: dict[str, Tensor] = {}

    def invert(batch: int, steps: int = options.steps, some: int | None = None, seed: int = 0) -> Tensor:
        return eg3d.find_anchors(
            G, album.first(len(album) if some is None else some), steps, init=known.encoder or "mean",
            perceptual=known.perceptual, batch_size=batch, seed=seed, progress=False,
        ).loss  # fmt: skip

    def keep(batch: int) -> None:
        losses[str(batch)] = invert(batch)

    actions = {str(batch): partial(keep, batch) for batch in options.batch}
    print(f"{len(album)} photos of {G.img_resolution}², {options.steps} steps each")
    times = bench.interleaved(actions, options.rounds, options.device)
    rate = bench.multiplication_rate(options.device)
    bench.header(COLUMNS)
    first = str(options.batch[0])
    per_photo: dict[str, tuple[float, float]] = {}
    rows = []
    for batch in options.batch:
        key, some = str(batch), min(batch, len(album))
        # two lengths of run, whose difference is that of one step without what a call does once
        one, two = (bench.count(partial(invert, batch, steps, some)) for steps in (1, 2))
        per_photo[key] = ((two.multiplications - one.multiplications) / some, (two.bytes - one.bytes) / some)
        taken = bench.milliseconds(times[key]) / 1000
        row = {
            "batch": batch,
            "photos": len(album),
            "steps": options.steps,
            "photos_per_minute": 60 * len(album) / taken,
            "photos_per_minute_at_best": 60 * rate / (per_photo[key][0] * options.steps),
            "of_first": 1 / bench.ratio(times, key, first),
            "by_count": per_photo[first][0] / per_photo[key][0],
            "by_bytes": per_photo[first][1] / per_photo[key][1],
            "loss": float(losses[key].mean()),
            "losses": losses[key].tolist(),
            "differs": _differs(losses[key], losses[first]),
            "seconds": times[key],
        }
        rows.append(row)
        bench.line(
            [batch, len(album), row["photos_per_minute"], row["photos_per_minute_at_best"], row["of_first"],
             row["by_count"], row["by_bytes"], f"{row['loss']:.4f}", f"{100 * row['differs']:.2f} %"], COLUMNS,
        )  # fmt: skip
    largest = max(options.batch)
    told["two_seeds_differ"] = _differs(invert(largest, seed=1), losses[str(largest)])
    print(f"two seeds at batch {largest} differ by {100 * told['two_seeds_differ']:.2f} %")
    what = f"photos per minute relative to batch {first}"
    bench.write(options.out, "anchors", told, rows, "batch {batch}", "of_first", what)


def _differs(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / torch.minimum(a, b)).mean())


if __name__ == "__main__":
    main()
