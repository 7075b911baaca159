"""The small parts that sections of the page share. Whatever text is given is escaped here."""

from __future__ import annotations

from html import escape

from torch import Tensor

from convlora.integrations.eg3d.album import resize
from convlora.integrations.eg3d.images import data_uri

LARGE, SMALL = 512, 256  # pixels at most: of held-out pictures, and of album photos and what sliders show


def text(value: object) -> str:
    return escape(str(value), quote=True)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def section(name: str, title: str, lead: str, body: str) -> str:
    """`body` is HTML; the name becomes an id."""
    return (
        f'<section id="{text(name)}" aria-labelledby="{text(name)}-title">\n<h2 id="{text(name)}-title">{text(title)}'
        f'</h2>\n<p class="lead">{text(lead)}</p>\n{body}\n</section>'
    )


def chip(name: str, key: int | None) -> str:
    return f'<span class="chip{"" if key is None else f" c{key}"}">{text(name)}</span>'


def image(picture: Tensor, largest: int, alt: str, extra: str = "") -> str:
    """(3, R, R) in [-1, 1] as an <img> of at most `largest` pixels a side."""
    if max(picture.shape[-2:]) > largest:
        picture = resize(picture[None].float(), largest)[0]
    height, width = picture.shape[-2:]
    return f'<img src="{data_uri(picture)}" width="{width}" height="{height}" alt="{text(alt)}"{extra}>'


def thumb(picture: Tensor, largest: int, group: str, title: str, name: str, style: str) -> str:
    """A picture that the viewer enlarges together with the others of its group."""
    return (
        f'<button type="button" class="thumb" data-group="{group}" data-title="{text(title)}" '
        f'data-name="{text(name)}" data-key="{style}" aria-label="enlarge: {text(f"{name}, {title}")}">'
        f"{image(picture, largest, '')}</button>"
    )
