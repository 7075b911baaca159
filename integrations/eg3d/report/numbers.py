"""The numbers of a report: how they are written, which is best, the terminal's table and report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal, NamedTuple

from convlora.integrations.eg3d.report.content import Report, Row

NONE = "–"


class Column(NamedTuple):
    """A column of the table: one text per row, and which of the rows hold the best value."""

    title: str
    cells: list[str]
    best: set[int]


def columns(rows: Sequence[Row], notes: Mapping[str, str]) -> list[Column]:
    """The table without its first column, the names: trainables, file, time, then the metrics in their order."""
    found = [
        Column("trainables", [NONE if row.trainables is None else f"{row.trainables:,}" for row in rows], set()),
        Column("file", [byte_size(row.file_bytes) for row in rows], set()),
        Column("time", [duration(row.seconds) for row in rows], set()),
    ]
    for metric in dict.fromkeys(name for row in rows for name in row.metrics):
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[direction(notes.get(metric, ""))]
        found.append(Column(metric + arrow, _metric_cells(rows, metric), _best(rows, metric, notes)))
    return found


def direction(note: str) -> Literal["higher", "lower"] | None:
    """Which way a metric improves, read from the words "higher is better" or "lower is better" in its note."""
    if "higher is better" in note.lower():
        return "higher"
    return "lower" if "lower is better" in note.lower() else None


def table(rows: Sequence[Row], metric_notes: Mapping[str, str]) -> str:
    """The numbers as aligned text for a terminal; the best of each metric has a star, the notes follow below."""
    parts = columns(rows, metric_notes)
    lines = [["model", *(part.title for part in parts)]]
    for index, row in enumerate(rows):
        # the others get a space where the best has its star, so that digits stay below digits
        marks = [("*" if index in part.best else " ") if part.best else "" for part in parts]
        lines.append([row.name, *(part.cells[index] + mark for part, mark in zip(parts, marks))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("─" * width for width in widths))
    used = [metric for metric in metric_notes if any(metric in row.metrics for row in rows)]
    if used:
        text += ["", *(f"{metric}: {metric_notes[metric]}" for metric in used)]
    if any(row.metrics for row in rows):
        text.append("mean ± standard deviation (number of values); * is the best of its column")
    return "\n".join(text)


def result_json(report: Report) -> dict[str, Any]:
    """Everything in the report but the pictures, ready for `json.dumps`; what is not finite becomes None."""
    return {
        "title": report.title,
        "person": report.person,
        "notice": report.notice,
        "command": report.command,
        "environment": dict(report.environment),
        "settings": dict(report.settings),
        "album_photos": len(report.album),
        "heldout_names": list(report.heldout_names),
        "rows": [_finite(asdict(row)) for row in report.rows],
        "metric_notes": dict(report.metric_notes),
        "moved_degrees": {
            name: {"mean": fmean(moved), "max": max(moved), "photos": moved}
            for name, moved in report.moved_degrees.items()
        },
        "curves": {name: [[step, _finite(loss)] for step, loss in points] for name, points in report.curves.items()},
    }


def moved_cameras(report: Report) -> dict[str, str]:
    """By how much refinement turned the cameras of which photos, in words."""
    return {
        name: f"{fmean(moved):.1f}° on average, {max(moved):.1f}° at most"
        for name, moved in report.moved_degrees.items()
    }


def byte_size(count: int | None) -> str:
    """1234567 -> "1.23 MB": decimal units, three digits, as file managers and papers write them."""
    if count is None:
        return NONE
    if count < 1000:
        return f"{count} B"
    value, unit = (count / 1e3, "kB") if count < 999_500 else (count / 1e6, "MB")
    if value >= 999.5:
        value, unit = value / 1e3, "GB"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def duration(seconds: float | None) -> str:
    """3725.0 -> "1 h 02 min"; below two minutes in seconds."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _decimals(rows: Sequence[Row], metric: str) -> int:
    """Digits after the point for a whole column: 0.851, 25.31, 102.4."""
    largest = max((abs(row.metrics[metric].mean) for row in rows if _measured(row, metric)), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return max(0, 3 - exponent) if exponent >= 0 else min(6, 2 - exponent)


def _metric_cells(rows: Sequence[Row], metric: str) -> list[str]:
    digits, cells = _decimals(rows, metric), []
    for row in rows:
        spread = row.metrics.get(metric)
        if spread is None:
            cells.append(NONE)
            continue
        deviation = f" ± {spread.std:.{digits}f}" if math.isfinite(spread.std) else ""
        cells.append(f"{spread.mean:.{digits}f}{deviation} ({spread.count})")
    return cells


def _measured(row: Row, metric: str) -> bool:
    return metric in row.metrics and math.isfinite(row.metrics[metric].mean)


def _best(rows: Sequence[Row], metric: str, notes: Mapping[str, str]) -> set[int]:
    """Rows that share the best mean as written: a difference that the table does not show is not marked."""
    better, digits = direction(notes.get(metric, "")), _decimals(rows, metric)
    means = {i: round(row.metrics[metric].mean, digits) for i, row in enumerate(rows) if _measured(row, metric)}
    if better is None or len(means) < 2:
        return set()
    best = max(means.values()) if better == "higher" else min(means.values())
    return {i for i, mean in means.items() if mean == best}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
