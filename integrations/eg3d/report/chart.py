"""Loss curves as inline SVG: coloured by the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]
POINTS = 300  # per curve: more would not be seen and makes the page heavy


def loss_chart(curves: Mapping[str, Sequence[Point]], styles: Mapping[str, int], width: int, height: int) -> str:
    """One <svg> with axes, ticks and a line per model, or "" without two finite points anywhere.

    `styles` numbers the models: line i has the classes `line c<i>`. Long curves are averaged over equal runs
    of steps; the loss axis is logarithmic when the losses span more than a factor of ten.
    """
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in curves.items()
    }
    drawn = {name: _thin(points) for name, points in finite.items() if len(points) > 1}
    if not drawn:
        return ""
    xs = [x for name in drawn for x, _ in finite[name]]
    ys = [y for points in drawn.values() for _, y in points]
    log = min(ys) > 0 and max(ys) > 10 * min(ys)
    x0 = 0.0 if 0 <= min(xs) < 0.1 * max(xs) else min(xs)
    x1 = max(xs) if max(xs) > x0 else x0 + 1
    x_ticks = linear_ticks(x0, x1, 4 if width < 500 else 7)
    y_ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(min(ys), max(ys), 5)
    y0, y1 = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    left, right, top, bottom = 62, 26, 12, 46
    scale = math.log10 if log else float

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0)
        up = (scale(y) - scale(y0)) / ((scale(y1) - scale(y0)) or 1)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    parts = []
    for tick in y_ticks:
        y = place(x0, tick)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    base = height - bottom
    for tick in x_ticks:
        x = place(tick, y0)[0]
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{height - 6}" text-anchor="middle">step</text>')
    across, label = (top + base) / 2, "loss (log scale)" if log else "loss"
    parts.append(
        f'<text class="name" transform="translate(14 {across:.0f}) rotate(-90)" text-anchor="middle">{label}</text>'
    )
    for name, points in drawn.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="line c{styles.get(name, 0)}" points="{path}"/>')
    ends = "; ".join(f"{name} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for name, p in drawn.items())
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"Loss over step: {ends}", quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below or at `low`'s step up to `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that reach over [low, high], with 2 and 5 between them while there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [float(f"{m}e{p}") for p in range(first, last + 1) for m in steps]
    above = next(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    below = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    return ticks[below : above + 1]


def _thin(points: Sequence[Point]) -> list[Point]:
    run = math.ceil(len(points) / POINTS)
    if run == 1:
        return list(points)
    runs = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in runs]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"
