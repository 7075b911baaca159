"""Sliders: players, which choose a picture of every model from a sheet of them, and the wipe between two pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.images import data_uri, grid
from convlora.integrations.eg3d.report.content import Axis, Report, Stage
from convlora.integrations.eg3d.report.html import SMALL, chip, image, text

GUTTER = 1  # pixels around each picture of a sheet, so that scaling never mixes neighbours


def player(stage: Stage, keys: Mapping[str, int]) -> str:
    """The models of a stage side by side, beside the original if it stands for all, and the sliders below."""
    figures = []
    if not stage.stops:
        figures = [_original(caption, photo) for caption, photo in stage.photos]
    figures += [_figure(stage, name, keys[name]) for name in stage.views]
    controls = "".join(_slider(stage.name, index, axis) for index, axis in enumerate(stage.axes))
    if stage.plays:
        controls += '<button type="button" class="play">Play</button>'
    if stage.stops:
        controls += _stops(stage)
    both = "" if len(stage.axes) == 1 else " both"
    across = f"--across:{min(len(figures), 4)}"
    return (
        f'<div class="player"><div class="stage{both}" style="{across}">{"".join(figures)}</div>\n'
        f'<div class="controls">{controls}</div></div>'
    )


def sheet(images: Tensor, columns: int) -> Tensor:
    """(N, 3, R, R) as one (3, rows · (R + 2), columns · (R + 2)): every picture with a margin of its own edge."""
    if images.shape[-1] > SMALL:
        images = resize(images.float(), SMALL)
    return grid(F.pad(images, [GUTTER] * 4, mode="replicate"), columns)


def _figure(stage: Stage, name: str, key: int) -> str:
    images = stage.views[name]
    columns = len(stage.axes[0].labels)
    side = min(images.shape[-1], SMALL)
    at = [axis.start for axis in stage.axes] + [0] * (2 - len(stage.axes))
    place = f"--columns:{columns};--rows:{len(images) // columns};--side:{side};--x:{at[0]};--y:{at[1]}"
    told = ", ".join([name, *(f"{axis.name} {axis.labels[axis.start]}" for axis in stage.axes)])
    picture = f'<img src="{data_uri(sheet(images, columns))}" alt="" draggable="false">'
    return (
        f'<figure><div class="frames" role="img" data-name="{text(name)}" aria-label="{text(told)}" style="{place}">'
        f"{picture}</div><figcaption>{chip(name, key)}</figcaption></figure>"
    )


def _original(caption: str, photo: Tensor) -> str:
    picture = image(photo, SMALL, caption, ' draggable="false"')
    return f'<figure class="original">{picture}<figcaption>{chip(caption, None)}</figcaption></figure>'


def _slider(stage: str, index: int, axis: Axis) -> str:
    last, label = len(axis.labels) - 1, axis.labels[axis.start]
    name = f"{stage}-{index}"
    return (
        f'<div class="control"><label for="{name}">{text(axis.name)}</label>'
        f'<input id="{name}" type="range" min="0" max="{last}" step="1" value="{axis.start}" autocomplete="off" '
        f'data-labels="{text(json.dumps(axis.labels))}" data-drag="{axis.drag}" aria-valuetext="{text(label)}"'
        f'{" disabled" if last < 1 else ""}><output for="{name}">{text(label)}</output></div>'
    )


def _stops(stage: Stage) -> str:
    buttons = "".join(
        f'<button type="button" data-stop="{stop}" aria-label="go to {text(caption)}">'
        f"{image(photo, SMALL, '')}<span>{text(caption)}</span></button>"
        for stop, (caption, photo) in zip(stage.stops, stage.photos)
    )
    return f'<div class="stops" style="--stops:{len(stage.stops)}">{buttons}</div>'


def compare(report: Report, keys: Mapping[str, int]) -> str:
    """The wipe between held-out photos and what models make of them. It shows the pictures of the section's thumbs."""
    names = report.heldout_names
    figures = "".join(
        f'<figure><div class="pair" data-name="{text(name)}" role="img"></div>'
        f"<figcaption>{chip(name, keys[name])}</figcaption></figure>"
        for name in report.heldout
    )
    wipe = Axis("share of the photo", [f"{share} %" for share in range(0, 101, 2)], 25)
    sliders = _slider("heldout", 0, wipe)
    sliders += _slider("heldout", 1, Axis("which photo", [f"{i} of {len(names)}" for i in range(1, len(names) + 1)]))
    check = '<label class="check"><input type="checkbox"> show the difference, four times as strong</label>'
    return (
        f'<div class="wipe"><div class="stage" style="--across:{min(len(report.heldout), 3)}">{figures}</div>\n'
        f'<div class="controls">{sliders}{check}</div></div>'
    )
