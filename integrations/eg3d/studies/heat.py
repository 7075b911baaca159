"""A study whose models are combinations, as a picture: rows by columns, a shade and a number for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convlora.errors import ConvloraError
from convlora.files import replacing

if TYPE_CHECKING:
    from convlora.integrations.eg3d.studies.results import Results


def heat_map(results: Results, rows: Mapping[str, Mapping[str, str]], path: Path) -> Path:
    """Write a PNG: a panel per metric of means over people, for `rows` {row: {column: model}}.

    Rows none of whose models were measured are left out; a combination that was not stays grey.

    Raises:
        ConvloraError: matplotlib is not installed, or nothing of the rows was measured.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConvloraError('plots need matplotlib: pip install "convlora[plot]"') from None
    measured = set(results.models())
    rows = {row: models for row, models in rows.items() if measured & set(models.values())}
    columns = list(dict.fromkeys(column for models in rows.values() for column in models))
    if not rows:
        raise ConvloraError(f"study {results.name} has measured nothing of what the heat map is of")
    down = len(results.metrics)
    figure = Figure(figsize=(2.2 + 0.62 * len(columns), (0.55 + 0.42 * len(rows)) * down + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, 1, squeeze=False, sharex=True).ravel()
    for axes, metric in zip(panels, results.metrics):
        table = [[_mean(results, models.get(column), metric) for column in columns] for models in rows.values()]
        _panel(axes, table, list(rows), columns)
        axes.set_title(metric, fontsize=9, loc="left")
    panels[-1].set_xlabel("blocks in which the style counts", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _mean(results: Results, model: str | None, metric: str) -> float:
    known = model is not None and results.has(model, metric)
    return results.interval(model, metric).mean if model is not None and known else math.nan


def _panel(axes: Any, table: list[list[float]], rows: list[str], columns: list[str]) -> None:
    axes.set_facecolor("0.92")
    drawn = axes.imshow(table, aspect="auto", cmap="viridis")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            if math.isfinite(value):
                shade = drawn.norm(value)
                axes.text(
                    x,
                    y,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if shade > 0.6 else "white",
                )
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
