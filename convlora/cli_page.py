"""`convlora eg3d page`: the page of a finished run once more, with other sliders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convlora.cli_adapters import Output
from convlora.cli_device import add_options


def add_verb(eg3d: Any) -> None:
    """Add `page` to the verbs of `eg3d`."""
    text = "draw the page of a finished run again, with edits and finer sliders"
    page = eg3d.add_parser("page", help=text, description=text)
    page.add_argument("run_folder", type=Path, metavar="RUN", help="folder of `personalize` or `demo`")
    page.add_argument(
        "--direction", type=Path, action="append", default=[], metavar="FILE",
        help="what `direction` wrote: a slider for that attribute; may be given again",
    )  # fmt: skip
    page.add_argument("--photo", metavar="NAME", help="the photo that is turned and edited (default: the first)")
    page.add_argument("--yaws", type=int, metavar="N", help="views from left to right (default 21, for the lab 9)")
    page.add_argument("--pitches", type=int, metavar="N", help="views from below to above (default 5)")
    page.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html, replaced)")
    add_options(page)
    page.set_defaults(run=_page)


def _page(options: argparse.Namespace) -> Output:
    from convlora.cli_device import prepare_device
    from convlora.errors import ConvloraError
    from convlora.integrations.eg3d.report import write_report
    from convlora.integrations.eg3d.report.content import LONGEST
    from convlora.integrations.eg3d.report.reopen import reopened
    from convlora.integrations.eg3d.tasks.directions import Direction

    for name, count in (("--yaws", options.yaws), ("--pitches", options.pitches)):
        if count is not None and not 1 <= count <= LONGEST:
            raise ConvloraError(f"{name} {count}: from 1 to {LONGEST} views, please")
    prepare_device(options.device)
    directions = [Direction.load(path) for path in options.direction]
    report = reopened(
        options.run_folder, directions or None, photo=options.photo, yaws=options.yaws, pitches=options.pitches,
        device=options.device, progress=not options.quiet,
    )  # fmt: skip
    path = write_report(report, options.out or options.run_folder / "report.html")
    size = path.stat().st_size
    stages = [stage.title for stage in report.stages]
    return Output(
        f"{path}  ({size:,} bytes; {', '.join(stages)})", {"path": str(path), "bytes": size, "stages": stages}
    )
