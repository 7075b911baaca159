"""A step of tuning with the backbone's constant blocks kept, and with them run every time, by where the adapter is.

python benchmarks/prefix.py [--only full fine+sr sr] [--batch 4] [--rank 1]
python benchmarks/prefix.py --config ffhq512-128 --device cuda

Latents of photos do not change while weights are tuned, so blocks in front of the first adapted one give the same every
time; `tune` runs them once per photo (`convlora/integrations/eg3d/prefix.py`). Masks are the groups of
`convlora/integrations/eg3d/blocks.py`; "full" has no constant block, so its ratio says how much noise there is.

Floor. What is kept need not be run forward, and no gradient passed through it before: "× count" is the ratio of the
multiplications that ran, "× bytes" that of bytes. The renderer and the super-resolution run in all.
"""

from __future__ import annotations

import argparse
from functools import partial

import _common as bench
import torch
from _people import generator, networks, people_arguments, photos

import convlora
from convlora.integrations import eg3d
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.blocks import mask_name, masked_ranks, masks
from convlora.integrations.eg3d.losses import photo_loss, reconstruct
from convlora.integrations.eg3d.personalize import TARGETS, narrow
from convlora.integrations.eg3d.prefix import constant_prefix

MASKS = {mask_name(mask): mask for mask in masks() if mask}
COLUMNS = {
    "adapter in": -11, "trainables": 10, "kept blocks": 11, "ms run": 8, "ms kept": 8, "kept/run": 8, "× count": 8,
    "× bytes": 8, "MB kept": 8,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = bench.arguments(__doc__, rounds=5)
    people_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=MASKS, default=["full", "fine+sr", "sr"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=1)
    options = parser.parse_args(argv)
    bench.prepare(options)
    told = bench.environment(options)
    bench.heading(told)
    G = generator(options)
    album = photos(options, G, options.batch).to(options.device)
    bench.header(COLUMNS)
    rows = [measure(options, G, album, name) for name in options.only]
    what = "of a step that runs all blocks, on the mask's own adapter"
    bench.write(options.out, "prefix", told, rows, "{mask}", "of_run", what)


def measure(options: argparse.Namespace, G: eg3d.TriPlaneGenerator, album: Photos, name: str) -> bench.Row:
    """A mask's row."""
    ranks = {**narrow(G, options.rank), **masked_ranks(G, MASKS[name])}
    adapter = convlora.inject_lora(G, options.rank, targets=list(TARGETS), ranks=ranks)
    w = torch.randn(len(album), G.w_dim, device=options.device)
    samples, perceptual = G.samples(len(album)), networks(options).perceptual
    tuned = list(adapter.parameters())
    kept = constant_prefix(G, w, tuned, options.batch)

    def step(begun: object) -> None:
        out = reconstruct(G, w, album.labels, samples=samples, begun=begun)
        photo_loss(out, album.images, perceptual).mean().backward()
        for parameter in tuned:
            parameter.grad = None

    actions = {"run": partial(step, None), "kept": partial(step, kept)}
    times = bench.interleaved(actions, options.rounds, options.device)
    counts = {variant: bench.count(action) for variant, action in actions.items()}
    size = 0 if kept is None else sum(x.numel() * x.element_size() for x in (kept.x, kept.img) if x is not None)
    row: bench.Row = {
        "mask": name, "trainables": adapter.num_trainable, "kept_blocks": 0 if kept is None else kept.blocks,
        "kept_bytes": size, "of_run": bench.ratio(times, "kept", "run"),
        "by_count": counts["kept"].multiplications / counts["run"].multiplications,
        "by_bytes": counts["kept"].bytes / counts["run"].bytes, "seconds": times,
    }  # fmt: skip
    adapter.remove()
    run, own = (bench.milliseconds(times[variant]) for variant in actions)
    bench.line(
        [name, row["trainables"], row["kept_blocks"], run, own, row["of_run"], row["by_count"], row["by_bytes"],
         size / 1e6], COLUMNS,
    )  # fmt: skip
    return row


if __name__ == "__main__":
    main()
