"""The README.md of an adapter on the Hub: metadata that the Hub can search, and a page that says how to load it.

The page is written between two marks. What somebody wrote around them, or added to the metadata, is kept when the
adapter is pushed again.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from convlora._version import __version__
from convlora.errors import HubError
from convlora.record import Record

if TYPE_CHECKING:
    from convlora.adapter import Adapter

#: Names that end like this are files, also where they could be `user/name`.
_FILE_SUFFIXES = (".safetensors", ".pkl", ".pt", ".pth", ".ckpt", ".bin", ".onnx")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_NO_CONSENT = ("", "not recorded")  # the second is what an album without a statement is saved with


class Page(NamedTuple):
    """What a card says beyond what the adapter itself knows."""

    repo_id: str
    filename: str  #: of the adapter in the repository
    size: int  #: of that file, in bytes
    dtypes: Sequence[str]  #: of the tensors in it, such as `["float16"]`
    pictures: Sequence[str]  #: paths in the repository
    base_model: str | None
    person: str | None
    consent: str | None
    load_base: str | None  #: code that makes `model`


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` reads as `user/name` on the Hub: no file here has that name, and nothing marks it as a path."""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or name.lower().endswith(_FILE_SUFFIXES):
        return False
    return not Path(name).exists()


def without_folder(base_model: str) -> str:
    """A base model as strangers may read it: a Hub id, a URL or a name as it is, of a local path the last part."""
    if "://" in base_model or is_hub_id(base_model):
        return base_model
    return re.split(r"[\\/]", base_model.rstrip("\\/"))[-1]


def is_consent(statement: str | None) -> bool:
    """Whether the text says anything: it is not blank, and not what albums without a statement are saved with."""
    return statement is not None and statement.strip().lower() not in _NO_CONSENT


def model_card(adapter: Adapter, record: Record, page: Page, licence: Mapping[str, str], old: str | None = None) -> str:
    """The text of README.md: written anew, or the page in `old` replaced and its metadata brought up to date.

    `record` is that of the file. `licence` has the Hub's fields `license`, `license_name`, `license_link`; without
    it the licence in `old` stays, or is given as unknown.
    """
    from huggingface_hub import ModelCard, ModelCardData

    kept, text = dict[str, Any](), ""
    if old is not None:
        try:
            card = ModelCard(old)
        except Exception as error:  # whatever the YAML parser raises
            raise HubError(f"the README.md of {page.repo_id} has metadata that cannot be read ({error})") from error
        kept, text = card.data.to_dict(), card.text
    if licence or "license" not in kept:
        kept = {key: value for key, value in kept.items() if key not in ("license", "license_name", "license_link")}
    head: dict[str, Any] = {"library_name": "convlora", "pipeline_tag": "unconditional-image-generation"}
    if page.base_model is not None and is_hub_id(page.base_model):
        head |= {"base_model": page.base_model, "base_model_relation": "adapter"}
    if "license" not in kept:
        head |= licence or {"license": "other", "license_name": "unknown-see-base-model"}
    tags = ["convlora", "adapter", record.method, "gan"]
    head = {**kept, **head, "tags": [*tags, *(tag for tag in kept.get("tags") or () if tag not in tags)]}
    begin, end = f"<!-- convlora: {page.filename} -->", f"<!-- end of {page.filename} -->"
    body = f"{begin}\n{_body(adapter, record, page)}\n{end}"
    before, found, rest = text.partition(begin)
    if found and end in rest:
        text = before + body + rest.partition(end)[2]
    else:
        title = "" if text.strip() else f"# {page.repo_id.rpartition('/')[2]}\n\n"
        text = f"{text.strip()}\n\n{title}{body}\n".lstrip("\n")
    return f"---\n{ModelCardData(**head).to_yaml()}\n---\n\n{text.lstrip()}"


def _body(adapter: Adapter, record: Record, page: Page) -> str:
    model = type(adapter.model).__name__
    parts = [
        f"An adapter for a convolutional generator ({model}), made with convlora {__version__}: the base model and "
        f"this file of {page.size:,} bytes together are the adapted model.",
        _facts(adapter, record, page),
        f"## Use\n\n```python\n{_snippet(page, model)}\n```\n\n`pip install convlora`; `adapter.set_strength(0.5)` "
        "turns it down, `adapter.remove()` takes it off again.",
    ]
    if page.person:
        parts.append(_person(page))
    if page.pictures:
        shown = [f"![{html.escape(Path(path).stem)}]({quote(path)})" for path in page.pictures]
        parts.append("## Pictures\n\n" + "\n".join(shown))
    if record.ranks:
        rows = [f"| `{layer}` | {rank} |" for layer, (rank, _) in record.ranks.items()]
        table = "\n".join(["| layer | rank |", "|---|---|", *rows])
        parts.append(f"<details><summary>{_layers(len(rows))}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _facts(adapter: Adapter, record: Record, page: Page) -> str:
    options = {k: v for k, v in record.options.items() if isinstance(v, str | int | float | bool) and k != "path"}
    counts = Counter(rank for rank, _ in record.ranks.values())
    ranks = ", ".join(f"{rank} on {_layers(count)}" for rank, count in sorted(counts.items()))
    inner = {rank: inner for rank, inner in record.ranks.values() if inner != rank}
    rows = {
        "method": f"`{record.method}` {html.escape(json.dumps(options), quote=False) if options else ''}",
        "ranks": (ranks or "none") + (f" (inner size up to {max(inner.values())})" if inner else ""),
        "trained values": f"{adapter.num_trainable:,}",
        "trained in full": f"{len(record.trained)} tensors" if record.trained else "",
        "file": f"`{page.filename}`, {page.size:,} bytes, {', '.join(page.dtypes)}",
        "base model": html.escape(without_folder(page.base_model), quote=False) if page.base_model else "not stated",
        "fingerprint of the base": f"`{record.base_fingerprint}`, compared when the adapter is loaded",
    }
    cells = [f"| {key} | {value.replace('|', chr(92) + '|').strip()} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *cells])


def _snippet(page: Page, model: str) -> str:
    base = f"# model is the base, a {model}, as you build or load it"
    if page.load_base:
        base = f"{page.load_base.strip()}\n"
    name = "" if page.filename == "adapter.safetensors" else f', filename="{page.filename}"'
    return f'import convlora\n\n{base}\nadapter = convlora.load_adapter(model, "{page.repo_id}"{name})'


def _person(page: Page) -> str:
    who = f"## The person\n\nWith this adapter the model shows one person: {_plain(page.person or '')}."
    if not is_consent(page.consent):
        return f"{who} No consent to a publication is recorded: keep this repository private."
    return f"{who} Their consent:\n\n> {_plain(page.consent or '')}"


def _plain(text: str) -> str:
    """Free text on one line, with no mark-up of its own."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
