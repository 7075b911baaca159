"""The report: one HTML file without outside references, nothing unescaped, and the same numbers everywhere."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("PIL")
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.report import Report, Row, Spread, result_json, table, write_report
from convlora.integrations.eg3d.report.chart import linear_ticks, log_ticks, loss_chart
from convlora.integrations.eg3d.report.numbers import byte_size, duration

VOID = {"meta", "img", "input", "br", "link", "line", "polyline"}
EVIL = '<script>alert("x")</script>&{{css}}'


class Page(HTMLParser):
    """Elements with their attributes, the text, and a check that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        found = [a for t, a in self.elements if t == tag]
        return [a for a in found if all(value in (a.get(key) or "").split() for key, value in attributes.items())]


def pictures(count: int, size: int = 8) -> Tensor:
    return torch.linspace(-1, 1, count * 3 * size * size).view(count, 3, size, size)


def report(**changes: Any) -> Report:
    names = ["pretrained", "LoRA rank 1"]
    values: dict[str, Any] = dict(
        title="A personal generator",
        person="Person A",
        notice="All pictures are procedural",
        command="convlora eg3d demo",
        environment={"torch": "2.13"},
        settings={"rank": "1"},
        album=pictures(3),
        rows=[
            Row("pretrained", 0, None, None, {"PSNR": Spread(21.3, 1.2, 2), "LPIPS": Spread(0.31, 0.02, 2)}),
            Row("LoRA rank 1", 95367, 184212, 88.2, {"PSNR": Spread(29.5, 0.8, 2), "LPIPS": Spread(0.11, 0.01, 2)}),
        ],
        metric_notes={"PSNR": "dB; higher is better", "LPIPS": "distance; lower is better", "unused": "nothing"},
        heldout_names=["a.png", "b.png"],
        heldout_truth=pictures(2),
        heldout={name: pictures(2) for name in names},
        turntable={name: pictures(5) for name in names},
        turntable_yaw=[-0.4, -0.2, 0.0, 0.2, 0.4],
        interpolation={name: pictures(3) for name in names},
        interpolation_weights=[0.0, 0.5, 1.0],
        curves={"LoRA rank 1": [(0, 1.0), (50, 0.3), (100, 0.05)]},
    )
    return Report(**{**values, **changes})


def written(content: Report, tmp_path: Path) -> tuple[str, Page]:
    path = write_report(content, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    html, page = written(report(), tmp_path)
    assert not re.search(r"https?:|//cdn|@import|url\(", html)
    assert not page.all("link") and not any(a.get("src") for a in page.all("script"))
    sources = [a["src"] or "" for a in page.all("img")]
    assert len(sources) == 3 + 2 * 3 + 5 * 2 + 3 * 2
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy


def test_every_section_is_there_and_labelled(tmp_path: Path) -> None:
    _, page = written(report(), tmp_path)
    sections = [a["id"] for a in page.all("section")]
    assert sections == ["numbers", "heldout", "turntable", "interpolation", "album", "curves"]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for a in page.all("section") + page.all("dialog"))
    sliders = page.all("input", type="range")
    assert [(a["max"], a["value"]) for a in sliders] == [("4", "2"), ("2", "0")]  # the turntable starts in front
    assert all(a["aria-label"] and a["aria-valuetext"] for a in sliders)
    assert all("alt" in a for a in page.all("img"))
    assert len(page.all("img", **{"class": "on"})) == 4  # one picture of each model shows, in both players
    assert all(a.get("aria-label") for a in page.all("button", **{"class": "thumb"}))
    groups = [a["data-group"] for a in page.all("button", **{"class": "thumb"})]
    assert groups == ["heldout-0"] * 3 + ["heldout-1"] * 3 + ["album-0", "album-1", "album-2"]
    assert json.loads(page.all("div", **{"class": "player"})[0]["data-labels"] or "") == [
        "−23°", "−11°", "0°", "+11°", "+23°",
    ]  # fmt: skip
    for words in ("All pictures are procedural", "convlora eg3d demo", "3 album photos", "2 photos held out"):
        assert words in page.text


def test_every_string_is_escaped(tmp_path: Path) -> None:
    plain, expected = written(report(), tmp_path)
    views = {EVIL: pictures(2)}
    html, page = written(
        report(
            title=EVIL, person=EVIL, notice=EVIL, command=EVIL, environment={EVIL: EVIL}, settings={EVIL: EVIL},
            rows=[Row(EVIL, 1, 1, 1.0, {EVIL: Spread(1.0, 0.1, 2)})], metric_notes={EVIL: EVIL + " higher is better"},
            heldout_names=[EVIL, EVIL], heldout=views, turntable=views, turntable_yaw=[0.0, 0.1], interpolation=views,
            interpolation_weights=[0.0, 1.0], curves={EVIL: [(0, 1.0), (1, 0.5)]},
        ),
        tmp_path,
    )  # fmt: skip
    assert "<script>alert" not in html and html.count("<script") == plain.count("<script") == 1
    assert html.count("<style") == 1 and len(page.all("style")) == len(expected.all("style")) == 1
    assert page.text.count(EVIL) > 12


def test_the_table_of_the_page_marks_the_best(tmp_path: Path) -> None:
    html, page = written(report(), tmp_path)
    # one table for wide pages and one for narrow ones, each with both metrics' best
    assert html.count('<td class="best">29.50 <small>± 0.80 (2)</small>') == 2
    assert html.count('<td class="best">0.110 <small>± 0.010 (2)</small>') == 2
    assert len(page.all("td", **{"class": "best"})) == 4
    for words in ("PSNR ↑", "LPIPS ↓", "95,367", "184 kB", "88.2 s"):
        assert page.text.count(words) == 2
    assert "unused" not in page.text


def test_the_terminal_table() -> None:
    content = report()
    lines = table(content.rows, content.metric_notes).splitlines()
    assert lines == [
        "model        trainables    file    time             PSNR ↑             LPIPS ↓",
        "───────────  ──────────  ──────  ──────  ─────────────────  ──────────────────",
        "pretrained            0       –       –  21.30 ± 1.20 (2)   0.310 ± 0.020 (2)",
        "LoRA rank 1      95,367  184 kB  88.2 s  29.50 ± 0.80 (2)*  0.110 ± 0.010 (2)*",
        "",
        "PSNR: dB; higher is better",
        "LPIPS: distance; lower is better",
        "mean ± standard deviation (number of values); * is the best of its column",
    ]


def test_best_needs_a_direction_a_rival_and_a_visible_difference() -> None:
    def stars(first: float, second: float, note: str) -> list[bool]:
        rows = [Row("a", 1, 1, 1.0, {"m": Spread(first, 0.1, 3)}), Row("b", 1, 1, 1.0, {"m": Spread(second, 0.1, 3)})]
        return [line.endswith("*") for line in table(rows, {"m": note}).splitlines()[2:4]]

    assert stars(0.5, 0.6, "Higher is better") == [False, True]
    assert stars(0.5, 0.6, "lower is better") == [True, False]
    assert stars(0.5, 0.6, "a number") == [False, False]
    assert stars(0.5, 0.50001, "higher is better") == [True, True]
    assert stars(math.nan, 0.5, "higher is better") == [False, False]


def test_spread_is_the_sample_deviation() -> None:
    assert Spread.of([1, 2, 3, 4]) == Spread(2.5, math.sqrt(5 / 3), 4)
    assert Spread.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]])) == Spread.of([1, 2, 3, 4])
    one = Spread.of([2.0])
    assert (one.mean, one.count) == (2.0, 1) and math.isnan(one.std)
    infinite = Spread.of([1.0, math.inf])  # the PSNR of an exact copy
    assert infinite.mean == math.inf and math.isnan(infinite.std)
    with pytest.raises(ConvloraError, match="no values"):
        Spread.of([])


def test_result_json_is_strict_json_with_the_numbers() -> None:
    rows = [Row("a", 3, None, None, {"PSNR": Spread.of([20.0])})]
    content = report(rows=rows, curves={"a": [(0, 1.0), (5, math.nan)]})
    result = json.loads(json.dumps(result_json(content), allow_nan=False))
    assert result["rows"] == [
        {
            "name": "a",
            "trainables": 3,
            "file_bytes": None,
            "seconds": None,
            "metrics": {"PSNR": {"mean": 20.0, "std": None, "count": 1}},
        }
    ]
    assert result["curves"] == {"a": [[0, 1.0], [5, None]]}
    assert (
        result["person"] == "Person A" and result["album_photos"] == 3 and result["heldout_names"] == ["a.png", "b.png"]
    )


def test_empty_parts_leave_no_section(tmp_path: Path) -> None:
    bare = report(
        rows=[], album=torch.empty(0, 3, 8, 8), heldout_names=[], heldout_truth=torch.empty(0, 3, 8, 8), heldout={},
        turntable={}, turntable_yaw=[], interpolation={}, interpolation_weights=[], curves={"a": [(0, 1.0)]},
        notice="", command="", settings={}, environment={},
    )  # fmt: skip
    _, page = written(bare, tmp_path)
    assert not page.all("section") and not page.all("pre") and not page.all("img")


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    large = pictures(2, 640)
    _, page = written(report(album=large, heldout_truth=large), tmp_path)
    assert sorted(int(a["width"] or 0) for a in page.all("img"))[-4:] == [256, 256, 512, 512]


def test_a_full_turn_goes_round(tmp_path: Path) -> None:
    turn = [2 * math.pi * i / 8 - math.pi for i in range(8)]
    _, page = written(report(turntable={"a": pictures(8)}, turntable_yaw=turn), tmp_path)
    assert page.all("div", **{"class": "player"})[0].get("data-round") == "1"
    _, page = written(report(), tmp_path)
    assert "data-round" not in page.all("div", **{"class": "player"})[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_names": ["a.png"]}, r"heldout_truth must be \(1, 3, R, R\).*got \(2, 3, 8, 8\)"),
        ({"turntable": {"m": pictures(4)}}, r"turntable\['m'\] must be \(5, 3, R, R\)"),
        ({"interpolation": {"m": torch.zeros(3, 1, 8, 8)}}, r"interpolation\['m'\] must be \(3, 3, R, R\)"),
        ({"turntable_yaw": [-25.0, -10.0, 0.0, 10.0, 25.0]}, "turntable_yaw is in radians"),
    ],
)
def test_mismatched_parts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvloraError, match=message):
        report(**changes)


def test_the_chart_stays_inside_its_frame_and_skips_what_is_not_finite() -> None:
    points = [(i, 1.0 / (1 + i)) for i in range(1000)] + [(1000, math.nan), (1001, math.inf)]
    svg = loss_chart({"a": points, "empty": []}, {"a": 2, "empty": 3}, 400, 300)
    assert "loss (log scale)" in svg and 'class="line c2"' in svg and "c3" not in svg
    polyline = re.search(r'points="([^"]+)"', svg)
    assert polyline is not None
    places = [tuple(map(float, pair.split(","))) for pair in polyline[1].split()]
    assert 100 < len(places) <= 300
    assert all(0 < x < 400 and 0 < y < 300 for x, y in places)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)  # falling loss: down the page
    flat = loss_chart({"a": [(7, 0.0), (7, 0.0)]}, {"a": 0}, 400, 300)
    assert "nan" not in flat and "log" not in flat and flat.startswith("<svg")
    assert loss_chart({"a": [(0, math.nan), (1, 1.0)]}, {"a": 0}, 400, 300) == ""


def test_ticks() -> None:
    assert linear_ticks(0, 2000, 4) == [0, 500, 1000, 1500, 2000]
    assert linear_ticks(-0.1, 0.33, 5) == [-0.1, 0, 0.1, 0.2, 0.3]
    assert log_ticks(0.021, 0.45) == [0.02, 0.05, 0.1, 0.2, 0.5]
    assert log_ticks(1e-6, 1.0) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]


def test_units() -> None:
    assert [byte_size(x) for x in (None, 0, 999, 1000, 184_212, 999_600, 124_938_268, 2_500_000_000)] == [
        "–", "0 B", "999 B", "1.00 kB", "184 kB", "1.00 MB", "125 MB", "2.50 GB",
    ]  # fmt: skip
    assert [duration(x) for x in (None, math.nan, 0.04, 88.2, 119.9, 120, 3599.6, 3725)] == [
        "–", "–", "0.0 s", "88.2 s", "120 s", "2 min 00 s", "1 h 00 min", "1 h 02 min",
    ]  # fmt: skip
