"""The report as one HTML file: pictures inside it, nothing loaded from anywhere, works from a disk or in a mail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from convlora.integrations.eg3d.images import write_bytes
from convlora.integrations.eg3d.report.chart import loss_chart
from convlora.integrations.eg3d.report.content import Report
from convlora.integrations.eg3d.report.html import LARGE, SMALL, chip, count, section, text, thumb
from convlora.integrations.eg3d.report.numbers import columns, direction, moved_cameras
from convlora.integrations.eg3d.report.player import compare, player

COLOURS = 6  # --c0 … --c5 of page.css


def write_report(report: Report, path: str | Path) -> Path:
    """Write `report` to `path` as a single HTML file, atomically, and return the path.

    Pictures are WebP data URIs, at most 512² (held-out) or 256² (the rest). Raises `FileError` if path is a folder.
    """
    return write_bytes(path, page(report).encode("utf-8"))


def page(report: Report) -> str:
    """The HTML text. Every string of the report is escaped; the page's own policy forbids remote content."""
    keys = {name: index % COLOURS for index, name in enumerate(report.models())}
    first, *others = [section(stage.name, stage.title, stage.lead, player(stage, keys)) for stage in report.stages] or [
        ""
    ]
    parts = [
        first,
        _heldout(report, keys),
        *others,
        _numbers(report, keys),
        _album(report),
        _curves(report, keys),
    ]
    slots = {
        "title": text(report.title),
        "facts": _facts(report),
        "notice": f'<p class="notice" role="note">{text(report.notice)}</p>' if report.notice else "",
        "sections": "\n".join(part for part in parts if part),
        "footer": _footer(report),
        "css": _asset("page.css"),
        "js": _asset("page.js"),
    }
    # one pass, so that a {{slot}} inside a person's name stays text
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _facts(report: Report) -> str:
    facts = [report.person, count(len(report.album), "album photo"), count(len(report.models()), "model")]
    if report.heldout_names:
        facts.insert(2, f"{count(len(report.heldout_names), 'photo')} held out")
    return text(" · ".join(facts))


def _numbers(report: Report, keys: Mapping[str, int]) -> str:
    if not report.rows:
        return ""
    parts = columns(report.rows, report.metric_notes)
    used = [metric for metric in report.metric_notes if any(metric in row.metrics for row in report.rows)]
    notes = "".join(f"<dt>{text(metric)}</dt><dd>{text(report.metric_notes[metric])}</dd>" for metric in used)
    lead = "What each model learns, and how it does on photos it has not seen."
    if any(row.metrics for row in report.rows):
        lead += " Mean ± standard deviation (number of values)."
    if any(direction(report.metric_notes[metric]) for metric in used):
        lead += " The best mean of each metric is shaded."
    names = [chip(row.name, keys[row.name]) for row in report.rows]
    cells = [[_cell(told, i in part.best) for i, told in enumerate(part.cells)] for part in parts]
    titles = [text(part.title) for part in parts]
    # a wide page has a model per line, as in a paper; a narrow one a model per column, which fits a phone
    table = _table("wide", "model", titles, names, [list(line) for line in zip(*cells)])
    table += _table("narrow", "", names, titles, cells)
    return section("numbers", "Numbers", lead, table + (f'<dl class="notes">{notes}</dl>' if notes else ""))


def _table(kind: str, corner: str, head: list[str], side: list[str], cells: list[list[str]]) -> str:
    top = "".join(f'<th scope="col">{title}</th>' for title in head)
    lines = "".join(f'<tr><th scope="row">{name}</th>{"".join(line)}</tr>' for name, line in zip(side, cells))
    return (
        f'<div class="scroll {kind}" role="region" aria-label="numbers" tabindex="0"><table class="numbers">'
        f"<thead><tr><td>{corner}</td>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _cell(told: str, best: bool) -> str:
    mean, *rest = text(told).split(" ", 1)
    if not rest or "(" not in rest[0]:  # a size or a time, not a mean with its spread
        return f"<td>{text(told)}</td>"
    mark = ' class="best"' if best else ""
    return f"<td{mark}>{mean} <small>{rest[0]}</small>{'<span class=unseen> best</span>' if best else ''}</td>"


def _heldout(report: Report, keys: Mapping[str, int]) -> str:
    if not report.heldout_names:
        return ""
    rows: list[tuple[str, Tensor, str]] = [("photo", report.heldout_truth, "chip")]
    rows += [(name, images, f"chip c{keys[name]}") for name, images in report.heldout.items()]
    cells = ['<span class="label corner"></span>']
    cells += [f'<span class="label {style}">{text(name)}</span>' for name, _, style in rows]
    for index, photo in enumerate(report.heldout_names):
        cells.append(f'<span class="label photo" title="{text(photo)}">{text(photo)}</span>')
        cells += [thumb(images[index], LARGE, f"heldout-{index}", photo, name, style) for name, images, style in rows]
    grid = f'<div class="compare" style="--rows:{len(rows)};--photos:{len(report.heldout_names)}">\n'
    lead = (
        "Photos that were kept from training, and what each model makes of them. Drag the edge across a picture: the "
        "photo is to its left, the reconstruction to its right."
    )
    below = '<p class="lead">All of them. Select one to see it enlarged.</p>'
    body = f'{compare(report, keys)}{below}<div class="scroll">{grid}' + "\n".join(cells) + "</div></div>"
    return section("heldout", "Original and reconstruction", lead, body)


def _album(report: Report) -> str:
    if not len(report.album):
        return ""
    thumbs = _album_thumbs(report)
    lead = f"What the models learned from: {count(len(report.album), 'photo')}."
    return section("album", "Album", lead, f'<div class="album">{"".join(thumbs)}</div>')


def _album_thumbs(report: Report) -> Iterator[str]:
    for index, photo in enumerate(report.album):
        title = f"album photo {index + 1} of {len(report.album)}"
        yield thumb(photo, SMALL, f"album-{index}", title, report.person, "")


def _curves(report: Report, keys: Mapping[str, int]) -> str:
    wide, narrow = loss_chart(report.curves, keys, 860, 340), loss_chart(report.curves, keys, 380, 300)
    if not wide:
        return ""
    line = '<line class="line c{}" x1="0" x2="34" y1="5" y2="5"/>'
    names = "".join(
        f'<li><svg viewBox="0 0 34 10" aria-hidden="true">{line.format(keys[name])}</svg>{text(name)}</li>'
        for name, points in report.curves.items()
        if points
    )
    body = f'<ul class="keys">{names}</ul><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    return section("curves", "Training", "Loss over training steps.", f'<div class="chart">{body}</div>')


def _footer(report: Report) -> str:
    parts = [f"<h2>Command</h2>\n<pre><code>{text(report.command)}</code></pre>"] if report.command else []
    sets = [
        f"<div><h2>{title}</h2><table>{''.join(_pair(*pair) for pair in values.items())}</table></div>"
        for title, values in (
            ("Settings", report.settings),
            ("Cameras turned by", moved_cameras(report)),
            ("Environment", report.environment),
        )
        if values
    ]
    return "\n".join(parts) + (f'\n<div class="sets">{"".join(sets)}</div>' if sets else "")


def _pair(name: str, value: str) -> str:
    return f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
