"""All studies of a folder on one HTML page: our numbers beside the paper's, what holds, and what ours come from."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from convlora.integrations.eg3d.metrics.bootstrap import Interval
from convlora.integrations.eg3d.run_folder import write_text
from convlora.integrations.eg3d.studies.results import Claim, Results, Verdict

DRAWN = (
    "Ours come from procedural heads at 128² and a small EG3D trained on such heads; the paper's from photographs of "
    "celebrities at 512², ArcFace and LPIPS. The scales differ: compare orders and signs, not values."
)
PHOTOGRAPHS = (
    "Ours come from the albums and networks that the command names, the paper's from celebrities, ArcFace and LPIPS. "
    "They show real people: keep this page private unless they agreed to its publication."
)
_MARKS = {"holds": "✓ holds", "does not hold": "✗ does not hold", "undecided": "? undecided"}


def write_page(results: Sequence[Results], path: Path) -> Path:
    """One HTML file without remote content, with the plots and pictures that lie beside it."""
    css = files("convlora.integrations.eg3d.report").joinpath("page.css").read_text(encoding="utf-8")
    judged = [[(claim, *one.verdict(claim)) for claim in one.claims] for one in results]
    found = "".join(
        f'<li><a href="#{escape(one.name)}">{escape(one.title)}</a>{_marks(claims)}</li>'
        for one, claims in zip(results, judged)
    )
    told = " ".join(dict.fromkeys(one.facts["data"] for one in results))
    body = "\n".join(_section(one, claims, path.parent) for one, claims in zip(results, judged))
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Studies of personal generators</title><style>{css}</style></head>
<body><header class="top"><h1>Studies of personal generators</h1></header><main>
<p class="notice" role="note">{escape(told)} Intervals are 95 %, by bootstrap over people, then photos;
with few people they are too narrow rather than too wide.</p>
<ul>{found}</ul>
{body}
</main></body></html>
""",
    )
    return path


#: Claims with their verdicts and differences.
Judged = list[tuple[Claim, Verdict, Interval]]


def _section(results: Results, judged: Judged, folder: Path) -> str:
    models = results.models()
    head = "".join(f'<th scope="col">{escape(metric)}</th>' for metric in results.metrics)
    rows = []
    for model in models:
        cells = []
        for metric in results.metrics:
            ours = escape(str(results.interval(model, metric))) if results.has(model, metric) else "–"
            paper = results.paper.get(model, {}).get(metric)
            cells.append(f"<td>{ours}" + (f"<br><small>paper {escape(paper)}</small>" if paper else "") + "</td>")
        rows.append(f'<tr><th scope="row">{escape(model)}</th>{"".join(cells)}</tr>')
    claims = []
    for claim, verdict, found in judged:
        claims.append(
            f"<li><strong>{_MARKS[verdict]}</strong>: {escape(claim.text)} <small>({escape(claim.metric)}: difference "
            f"{escape(str(found))}, margin {claim.margin:g})</small></li>"
        )
    meaning = "; ".join(f"{name}: {text}" for name, text in results.metrics.items())
    notes = "".join(f"<p>{escape(note)}</p>" for note in [meaning, *results.notes])
    people = len({value.person for value in results.values})
    listed = f"<ul>{''.join(claims)}</ul>" if claims else ""
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in results.facts.items())
    plot = _picture(folder / f"{results.name}.png", f"{results.title}: means and intervals")
    plot = _picture(folder / f"{results.name}_masks.png", f"{results.title}: means over combinations") + plot
    examples = _picture(folder / f"{results.name}_pictures.webp", f"{results.title}: pictures of one person")
    return f"""<section id="{escape(results.name)}"><h2>{escape(results.title)}</h2>
<p>{people} people, {len(results.values):,} values.</p>
<div class="scroll"><table class="numbers"><thead><tr><th>model</th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
{listed}{plot}{examples}{notes}<dl class="notes">{told}</dl></section>"""


def _marks(judged: Judged) -> str:
    """Every claim's mark with its text."""
    return "".join(
        f"<br><small>{_MARKS[verdict]}: {escape(claim.text)} ({escape(claim.metric)})</small>"
        for claim, verdict, _ in judged
    )


def _picture(file: Path, alt: str) -> str:
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape(alt)}" src="data:image/{file.suffix[1:]};base64,{data}"></p>'
