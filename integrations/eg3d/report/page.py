"""The report as one HTML file: pictures inside it, nothing loaded from anywhere, works from a disk or in a mail."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.images import data_uri, write_bytes
from convlora.integrations.eg3d.report.chart import loss_chart
from convlora.integrations.eg3d.report.content import Report, Views
from convlora.integrations.eg3d.report.numbers import columns, direction, moved_cameras

COLOURS = 6  # --c0 … --c5 of page.css
LARGE, SMALL = 512, 256  # pixels at most: of held-out pictures, and of album photos and animation frames


def write_report(report: Report, path: str | Path) -> Path:
    """Write `report` to `path` as a single HTML file, atomically, and return the path.

    Pictures are WebP data URIs, at most 512² (held-out) or 256² (the rest). Raises `FileError` if path is a folder.
    """
    return write_bytes(path, page(report).encode("utf-8"))


def page(report: Report) -> str:
    """The HTML text. Every string of the report is escaped; the page's own policy forbids remote content."""
    keys = {name: index % COLOURS for index, name in enumerate(report.models())}
    parts = [
        _numbers(report, keys),
        _heldout(report, keys),
        _turntable(report, keys),
        _interpolation(report, keys),
        _album(report),
        _curves(report, keys),
    ]
    slots = {
        "title": _text(report.title),
        "facts": _facts(report),
        "notice": f'<p class="notice" role="note">{_text(report.notice)}</p>' if report.notice else "",
        "sections": "\n".join(part for part in parts if part),
        "footer": _footer(report),
        "css": _asset("page.css"),
        "js": _asset("page.js"),
    }
    # one pass, so that a {{slot}} inside a person's name stays text
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _facts(report: Report) -> str:
    facts = [report.person, _count(len(report.album), "album photo"), _count(len(report.models()), "model")]
    if report.heldout_names:
        facts.insert(2, f"{_count(len(report.heldout_names), 'photo')} held out")
    return _text(" · ".join(facts))


def _section(name: str, title: str, lead: str, body: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{_text(title)}</h2>\n'
        f'<p class="lead">{_text(lead)}</p>\n{body}\n</section>'
    )


def _chip(name: str, key: int | None) -> str:
    return f'<span class="chip{"" if key is None else f" c{key}"}">{_text(name)}</span>'


def _image(picture: Tensor, largest: int, alt: str, extra: str = "") -> str:
    if max(picture.shape[-2:]) > largest:
        picture = resize(picture[None].float(), largest)[0]
    height, width = picture.shape[-2:]
    return f'<img src="{data_uri(picture)}" width="{width}" height="{height}" alt="{_text(alt)}"{extra}>'


def _thumb(picture: Tensor, largest: int, group: str, title: str, name: str, chip: str) -> str:
    """A picture that the viewer enlarges together with the others of its group."""
    return (
        f'<button type="button" class="thumb" data-group="{group}" data-title="{_text(title)}" '
        f'data-name="{_text(name)}" data-key="{chip}" aria-label="enlarge: {_text(f"{name}, {title}")}">'
        f"{_image(picture, largest, '')}</button>"
    )


def _numbers(report: Report, keys: Mapping[str, int]) -> str:
    if not report.rows:
        return ""
    parts = columns(report.rows, report.metric_notes)
    used = [metric for metric in report.metric_notes if any(metric in row.metrics for row in report.rows)]
    notes = "".join(f"<dt>{_text(metric)}</dt><dd>{_text(report.metric_notes[metric])}</dd>" for metric in used)
    lead = "What each model learns, and how it does on photos it has not seen."
    if any(row.metrics for row in report.rows):
        lead += " Mean ± standard deviation (number of values)."
    if any(direction(report.metric_notes[metric]) for metric in used):
        lead += " The best mean of each metric is shaded."
    names = [_chip(row.name, keys[row.name]) for row in report.rows]
    cells = [[_cell(text, i in part.best) for i, text in enumerate(part.cells)] for part in parts]
    titles = [_text(part.title) for part in parts]
    # a wide page has a model per line, as in a paper; a narrow one a model per column, which fits a phone
    table = _table("wide", "model", titles, names, [list(line) for line in zip(*cells)])
    table += _table("narrow", "", names, titles, cells)
    return _section("numbers", "Numbers", lead, table + (f'<dl class="notes">{notes}</dl>' if notes else ""))


def _table(kind: str, corner: str, head: list[str], side: list[str], cells: list[list[str]]) -> str:
    top = "".join(f'<th scope="col">{title}</th>' for title in head)
    lines = "".join(f'<tr><th scope="row">{name}</th>{"".join(line)}</tr>' for name, line in zip(side, cells))
    return (
        f'<div class="scroll {kind}" role="region" aria-label="numbers" tabindex="0"><table class="numbers">'
        f"<thead><tr><td>{corner}</td>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _cell(text: str, best: bool) -> str:
    mean, *rest = _text(text).split(" ", 1)
    if not rest or "(" not in rest[0]:  # a size or a time, not a mean with its spread
        return f"<td>{_text(text)}</td>"
    mark = ' class="best"' if best else ""
    return f"<td{mark}>{mean} <small>{rest[0]}</small>{'<span class=unseen> best</span>' if best else ''}</td>"


def _heldout(report: Report, keys: Mapping[str, int]) -> str:
    if not report.heldout_names:
        return ""
    rows: list[tuple[str, Tensor, str]] = [("photo", report.heldout_truth, "chip")]
    rows += [(name, images, f"chip c{keys[name]}") for name, images in report.heldout.items()]
    cells = ['<span class="label corner"></span>']
    cells += [f'<span class="label {chip}">{_text(name)}</span>' for name, _, chip in rows]
    for index, photo in enumerate(report.heldout_names):
        cells.append(f'<span class="label photo" title="{_text(photo)}">{_text(photo)}</span>')
        cells += [_thumb(images[index], LARGE, f"heldout-{index}", photo, name, chip) for name, images, chip in rows]
    grid = f'<div class="compare" style="--rows:{len(rows)};--photos:{len(report.heldout_names)}">\n'
    lead = "Photos that were kept from training, and each model's reconstruction. Select one to compare it enlarged."
    return _section(
        "heldout", "Held-out photos", lead, f'<div class="scroll">{grid}' + "\n".join(cells) + "</div></div>"
    )


def _player(views: Views, keys: Mapping[str, int], labels: Sequence[str], slider: str, start: int, play: bool,
            whole_turn: bool = False) -> str:  # fmt: skip
    """Models side by side with one range input that chooses the picture of all of them."""
    figures = []
    for name, images in views.items():
        frames = "".join(
            _image(image, SMALL, "", ' draggable="false"' + (' class="on"' if i == start else ""))
            for i, image in enumerate(images)
        )
        caption = f"<figcaption>{_chip(name, keys[name])}</figcaption>"
        figures.append(
            f'<figure><div class="frames" role="img" aria-label="{_text(name)}">{frames}</div>{caption}</figure>'
        )
    button = '<button type="button">Play</button>' if play else ""
    return (
        f'<div class="player" data-labels="{_text(json.dumps(list(labels)))}"{" data-round=1" if whole_turn else ""}>'
        f'<div class="stage" style="--across:{min(len(views), 4)}">{"".join(figures)}</div>'
        f'<div class="controls">{button}<input type="range" min="0" max="{len(labels) - 1}" step="1" value="{start}" '
        f'autocomplete="off" aria-label="{_text(slider)}" aria-valuetext="{_text(labels[start])}">'
        f"<output>{_text(labels[start])}</output></div></div>"
    )


def _turntable(report: Report, keys: Mapping[str, int]) -> str:
    if not report.turntable or not report.turntable_yaw:
        return ""
    yaws = report.turntable_yaw
    front = min(range(len(yaws)), key=lambda i: abs(yaws[i]))
    labels = [f"{math.degrees(yaw):+.0f}°".replace("-", "−") if round(math.degrees(yaw)) else "0°" for yaw in yaws]
    whole_turn = len(yaws) > 2 and abs(yaws[-1] - yaws[0]) > 2 * math.pi * (1 - 1.5 / len(yaws))
    player = _player(report.turntable, keys, labels, "yaw of the camera", front, True, whole_turn)
    lead = "The same head from around it. Drag a picture, move the slider or use the arrow keys."
    return _section("turntable", "Turntable", lead, player)


def _interpolation(report: Report, keys: Mapping[str, int]) -> str:
    if not report.interpolation or not report.interpolation_weights:
        return ""
    labels = [f"{weight:.2f}" for weight in report.interpolation_weights]
    player = _player(report.interpolation, keys, labels, "weight of the second photo", 0, False)
    lead = "From the latent of one album photo (weight 0) to that of another (weight 1). It should stay one person."
    return _section("interpolation", "Interpolation", lead, player)


def _album(report: Report) -> str:
    if not len(report.album):
        return ""
    thumbs = _album_thumbs(report)
    lead = f"What the models learned from: {_count(len(report.album), 'photo')}."
    return _section("album", "Album", lead, f'<div class="album">{"".join(thumbs)}</div>')


def _album_thumbs(report: Report) -> Iterator[str]:
    for index, photo in enumerate(report.album):
        title = f"album photo {index + 1} of {len(report.album)}"
        yield _thumb(photo, SMALL, f"album-{index}", title, report.person, "")


def _curves(report: Report, keys: Mapping[str, int]) -> str:
    wide, narrow = loss_chart(report.curves, keys, 860, 340), loss_chart(report.curves, keys, 380, 300)
    if not wide:
        return ""
    line = '<line class="line c{}" x1="0" x2="34" y1="5" y2="5"/>'
    names = "".join(
        f'<li><svg viewBox="0 0 34 10" aria-hidden="true">{line.format(keys[name])}</svg>{_text(name)}</li>'
        for name, points in report.curves.items()
        if points
    )
    body = f'<ul class="keys">{names}</ul><div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    return _section("curves", "Training", "Loss over training steps.", f'<div class="chart">{body}</div>')


def _footer(report: Report) -> str:
    parts = [f"<h2>Command</h2>\n<pre><code>{_text(report.command)}</code></pre>"] if report.command else []
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
    return f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
