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
from convlora.integrations.eg3d.report import Axis, Report, Row, Spread, Stage, result_json, table, write_report
from convlora.integrations.eg3d.report.chart import linear_ticks, log_ticks, loss_chart
from convlora.integrations.eg3d.report.numbers import byte_size, duration
from convlora.integrations.eg3d.report.player import sheet

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


def turntable(names: list[str]) -> Stage:
    axes = (Axis("turn", ["−23°", "−11°", "0°", "+11°", "+23°"], 2, -1), Axis("tilt", ["−9°", "+9°"], 1))
    views = {name: pictures(10) for name in names}
    return Stage("turntable", "Turn the head", "Drag it.", axes, views, [("the photo", pictures(1)[0])], plays=True)


def path(names: list[str]) -> Stage:
    photos = [("photo 1", pictures(1)[0]), ("photo 2", -pictures(1)[0])]
    views = {name: pictures(3) for name in names}
    return Stage(
        "interpolation", "Between", "", (Axis("between", ["photo 1", "half", "photo 2"]),), views, photos, [0, 2]
    )


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
        stages=[turntable(names), path(names)],
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
    # album, held-out and reconstructions, a photo and two sheets, two stops and two sheets
    assert len(sources) == 3 + 2 * 3 + (1 + 2) + (2 + 2)
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy


def test_every_section_is_there_and_labelled(tmp_path: Path) -> None:
    _, page = written(report(), tmp_path)
    sections = [a["id"] for a in page.all("section")]
    assert sections == ["turntable", "heldout", "interpolation", "numbers", "album", "curves"]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for a in page.all("section") + page.all("dialog"))
    sliders = page.all("input", type="range")
    assert [(a["id"], a["max"], a["value"]) for a in sliders] == [
        ("turntable-0", "4", "2"), ("turntable-1", "1", "1"), ("heldout-0", "50", "25"), ("heldout-1", "1", "0"),
        ("interpolation-0", "2", "0"),
    ]  # fmt: skip
    assert [a["for"] for a in page.all("label") if "for" in a] == [a["id"] for a in sliders]
    assert all(a["aria-valuetext"] == json.loads(a["data-labels"] or "")[int(a["value"] or 0)] for a in sliders)
    assert all("alt" in a for a in page.all("img"))
    shown = page.all("div", **{"class": "frames"})  # each model's sheet of pictures, and which of them shows
    assert [a["style"] for a in shown] == 2 * ["--columns:5;--rows:2;--side:8;--x:2;--y:1"] + 2 * [
        "--columns:3;--rows:1;--side:8;--x:0;--y:0"
    ]
    assert shown[0]["aria-label"] == "pretrained, turn 0°, tilt +9°"
    assert [a["data-stop"] for a in page.all("button") if "data-stop" in a] == ["0", "2"]
    assert all(a.get("aria-label") for a in page.all("button", **{"class": "thumb"}))
    groups = [a["data-group"] for a in page.all("button", **{"class": "thumb"})]
    assert groups == ["heldout-0"] * 3 + ["heldout-1"] * 3 + ["album-0", "album-1", "album-2"]
    for words in ("All pictures are procedural", "convlora eg3d demo", "3 album photos", "2 photos held out"):
        assert words in page.text


def test_every_string_is_escaped(tmp_path: Path) -> None:
    plain, expected = written(report(), tmp_path)
    views = {EVIL: pictures(2)}
    stage = Stage("a", EVIL, EVIL, (Axis(EVIL, [EVIL, EVIL]),), views, [(EVIL, pictures(1)[0])])
    html, page = written(
        report(
            title=EVIL, person=EVIL, notice=EVIL, command=EVIL, environment={EVIL: EVIL}, settings={EVIL: EVIL},
            rows=[Row(EVIL, 1, 1, 1.0, {EVIL: Spread(1.0, 0.1, 2)})], metric_notes={EVIL: EVIL + " higher is better"},
            heldout_names=[EVIL, EVIL], heldout=views, stages=[stage], curves={EVIL: [(0, 1.0), (1, 0.5)]},
        ),
        tmp_path,
    )  # fmt: skip
    assert "<script>alert" not in html and html.count("<script") == plain.count("<script") == 1
    assert len(page.all("style")) == len(expected.all("style")) == html.count("<style")
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
        stages=[], curves={"a": [(0, 1.0)]},
        notice="", command="", settings={}, environment={},
    )  # fmt: skip
    _, page = written(bare, tmp_path)
    assert not page.all("section") and not page.all("pre") and not page.all("img")


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    large = pictures(2, 640)
    wide = Stage("wide", "", "", (Axis("a", ["0", "1"]),), {"m": large})
    _, page = written(report(album=large, heldout_truth=large, stages=[wide]), tmp_path)
    assert sorted(int(a.get("width") or 0) for a in page.all("img"))[-4:] == [256, 256, 512, 512]
    assert "--side:256;" in (page.all("div", **{"class": "frames"})[0]["style"] or "")


def test_a_sheet_keeps_every_picture_apart_from_its_neighbours() -> None:
    images = pictures(6)
    whole = sheet(images, 3)
    assert whole.shape == (3, 2 * 10, 3 * 10)
    for k, image in enumerate(images):
        top, left = k // 3 * 10, k % 3 * 10
        assert torch.equal(whole[:, top + 1 : top + 9, left + 1 : left + 9], image)
        assert torch.equal(whole[:, top, left + 1 : left + 9], image[:, 0]), "the margin repeats the picture's edge"


def test_a_stage_gives_the_row_of_its_start() -> None:
    stage = turntable(["m"])
    assert torch.equal(stage.first_row()["m"], stage.views["m"][5:])
    assert torch.equal(path(["m"]).first_row()["m"], pictures(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": {"m": pictures(4)}}, r"a\['m'\] must be \(3, 3, R, R\)"),
        ({"views": {"m": torch.zeros(3, 1, 8, 8)}}, r"a\['m'\] must be \(3, 3, R, R\)"),
        ({"axes": ()}, "has 0 sliders; one or two"),
        ({"axes": (Axis("b", ["x"] * 61),)}, "'b' has 61 positions"),
        ({"axes": (Axis("b", ["x", "y", "z"], 3),)}, "starts at 3"),
        ({"stops": [0]}, r"has 0 photos and stops at \[0\]"),
        ({"stops": [3], "photos": [("p", pictures(1)[0])]}, "each photo needs one, below 3"),
    ],
)
def test_stages_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = dict(name="a", title="", lead="", axes=(Axis("b", ["x", "y", "z"]),), views={})
    with pytest.raises(ConvloraError, match=message):
        Stage(**{**whole, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_names": ["a.png"]}, r"heldout_truth must be \(1, 3, R, R\).*got \(2, 3, 8, 8\)"),
        ({"heldout": {"m": pictures(3)}}, r"heldout\['m'\] must be \(2, 3, R, R\)"),
        ({"stages": [turntable(["m"])] * 2}, "two stages have one name: turntable, turntable"),
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
