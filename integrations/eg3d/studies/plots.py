"""A study's values as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convlora.errors import ConvloraError
from convlora.files import replacing
from convlora.integrations.eg3d.metrics.bootstrap import bootstrap

if TYPE_CHECKING:
    from convlora.integrations.eg3d.studies.results import Results


def plot(results: Results, path: Path) -> Path:
    """Write a PNG: a panel per metric, with a dot and its interval per model, or curves over the study's axis.

    Raises:
        ConvloraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConvloraError('plots need matplotlib: pip install "convlora[plot]"') from None
    across = min(4, len(results.metrics))
    down = -(-len(results.metrics) // across)
    height = 3.0 if results.axis else 0.9 + 0.32 * len(results.models())
    figure = Figure(figsize=(3.2 * across + 1 + (results.axis is not None), height * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, metric in zip(panels, results.metrics):
        (_curves if results.axis else _dots)(results, metric, axes)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(results.metrics) :]:
        axes.set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _dots(results: Results, metric: str, axes: Any) -> None:
    models = results.models()
    for row, model in enumerate(models):
        if results.has(model, metric):
            found = results.interval(model, metric)
            axes.plot([found.low, found.high], [row, row], color="C0", linewidth=2)
            axes.plot(found.mean, row, "o", color="C0")
    axes.set_yticks(range(len(models)), models if axes.get_subplotspec().is_first_col() else [])
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _curves(results: Results, metric: str, axes: Any) -> None:
    """The mean over people at every point of the axis, and its interval as a band."""
    for number, model in enumerate(results.models()):
        points: dict[float, dict[str, list[float]]] = {}  # place -> person -> values
        for value in results.values:
            if (value.model, value.metric) == (model, metric):
                place = float(value.item.rpartition(f"{results.axis} ")[2])
                points.setdefault(place, {}).setdefault(value.person, []).append(value.value)
        places = sorted(points)
        found = [bootstrap(list(points[place].values())) for place in places]
        axes.plot(places, [one.mean for one in found], color=f"C{number}", marker="o", markersize=3, label=model)
        axes.fill_between(
            places, [one.low for one in found], [one.high for one in found], color=f"C{number}", alpha=0.15
        )
    axes.set_xlabel(results.axis, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
