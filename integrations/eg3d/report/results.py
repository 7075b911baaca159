"""Everything a run shows, in its output folder: the page, the numbers, a sheet of held-out photos, a turntable."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from convlora.files import replacing
from convlora.integrations.eg3d.images import save_animation, save_sheet
from convlora.integrations.eg3d.report.content import Report
from convlora.integrations.eg3d.report.numbers import result_json
from convlora.integrations.eg3d.report.page import write_report


def write_results(report: Report, folder: Path) -> list[Path]:
    """Write report.html, report.json, heldout.png and turntable.webp; the last two if there is anything to show."""
    written = [write_report(report, folder / "report.html")]
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(result_json(report), indent=2), encoding="utf-8")
    written.append(folder / "report.json")
    if report.heldout:
        written.append(save_sheet(folder / "heldout.png", [("photo", report.heldout_truth), *report.heldout.items()]))
    for turn in (stage for stage in report.stages if stage.name == "turntable"):
        frames = torch.cat(list(turn.first_row().values()), dim=3)
        there_and_back = torch.cat([frames, frames.flip(0)[1:-1]])
        written.append(save_animation(folder / "turntable.webp", there_and_back, seconds=4))
    return written
