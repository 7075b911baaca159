"""The page in a real browser, from a disk: keyboard, touch and mouse, at the widths of a desk and of a phone."""

from __future__ import annotations

import io
import time

import pytest
import torch
from browser import CHROMIUM, DRIVER, browser

pytest.importorskip("PIL")
from PIL import Image

from convlora.integrations.eg3d.report import Axis, Report, Row, Spread, Stage, write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]
YAWS, PITCHES, SIDE = 5, 3, 40
MODELS = ("pretrained", "LoRA rank 1")


def plain(count, blue=0.0):
    """Pictures (count, 3, R, R) of one colour each, all different: its red says which one it is."""
    red = torch.arange(count) / max(1, count - 1)
    colours = torch.stack([red, 0.25 + 0.5 * red.flip(0), torch.full((count,), blue)], 1)
    return colours[:, :, None, None].expand(-1, 3, SIDE, SIDE) * 2 - 1


def a_report():
    axes = (Axis("turn", [f"{k}°" for k in range(YAWS)], 2, -1), Axis("tilt", [f"{k}°" for k in range(PITCHES)], 1))
    photo = plain(1)[0]
    turn = Stage("turntable", "Turn the head", "Drag.", axes, {}, [("the photo", photo)], plays=True)
    edit = Stage("edit1", "Edit: smile", "", (Axis("smile", ["−1", "0", "+1"], 1),), {}, [("the photo", photo)])
    stops = [("photo 1", photo), ("photo 2", photo)]
    path = Stage("interpolation", "Between", "", (Axis("between", list("abcde")),), {}, stops, [0, 4], True)
    stages = []
    for stage, count in ((turn, YAWS * PITCHES), (edit, 3), (path, 5)):
        views = {name: plain(count, blue) for name, blue in zip(MODELS, (0.0, 1.0))}
        stages.append(Stage(**{**vars(stage), "views": views}))
    return Report(
        title="A page", person="Person A", notice="Drawn by a program", command="none", environment={}, settings={},
        album=plain(3), rows=[Row(name, 1, 1, 1.0, {"PSNR": Spread(20, 1, 2)}) for name in MODELS],
        metric_notes={"PSNR": "higher is better"}, heldout_names=["a.png", "b.png", "c.png"],
        heldout_truth=plain(3, 0.5), heldout={name: -plain(3, 0.5) for name in MODELS}, stages=stages,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser that shows the page, which is in a folder with a space and an umlaut."""
    folder = tmp_path_factory.mktemp("a päge")
    path = write_report(a_report(), folder / "report.html")
    with browser(tmp_path_factory.mktemp("profile")) as window:
        window.resize(1280, 900)
        window.path = path
        yield window


@pytest.fixture(autouse=True)
def _fresh(page):
    page.log("browser")
    page.requests()
    page.resize(1280, 900)
    page.open(page.path.as_uri())
    yield
    wrong = [entry["message"] for entry in page.log("browser")]
    assert not wrong, "errors and warnings in the console"
    asked = [address for address in page.requests() if not address.startswith("data:")]
    assert set(asked) == {page.path.as_uri()}, "the page asks for nothing but itself"


def shown(page, selector):
    """The colours in the middle and near the corners of what an element shows, as 0 … 255."""
    picture = Image.open(io.BytesIO(page.pixels(selector))).convert("RGB")
    width, height = picture.size
    places = [(width // 2, height // 2)] + [(x, y) for x in (9, width - 9) for y in (9, height - 9)]
    return [picture.getpixel(place) for place in places]


def index(page, selector, count):
    """Which of `count` plain pictures an element shows, the same all over."""
    reds = [red for red, _, _ in shown(page, selector)]
    assert max(reds) - min(reds) < 12, "one picture, not parts of two"
    return round(reds[0] / 255 * (count - 1))


def frames(section, number):
    return f"#{section} figure:nth-of-type({number}) .frames"


@pytest.mark.parametrize(
    ("slider", "keys", "position"),
    [
        ("turntable-0", ["right"], 1 * YAWS + 3),
        ("turntable-0", ["home"], 1 * YAWS + 0),
        ("turntable-0", ["end", "right"], 1 * YAWS + 4),
        ("turntable-1", ["up"], 2 * YAWS + 2),
        ("turntable-1", ["down"], 0 * YAWS + 2),
        ("edit1-0", ["left"], 0),
        ("interpolation-0", ["right", "right", "right"], 3),
    ],
)
def test_keys_move_a_slider_and_every_model_follows(page, slider, keys, position):
    section = slider.split("-")[0]
    count = {"turntable": YAWS * PITCHES, "edit1": 3, "interpolation": 5}[section]
    first = 1 if section == "interpolation" else 2  # an original comes first in the others
    before = [index(page, frames(section, first + i), count) for i in range(2)]
    page.press(f"#{slider}", *keys)
    after = [index(page, frames(section, first + i), count) for i in range(2)]
    assert after == [position, position] != before
    said = page.js("return document.querySelector(arguments[0]).getAttribute('aria-label')", frames(section, first))
    label = page.js("return document.querySelector(arguments[0]).textContent", f'output[for="{slider}"]')
    assert said.startswith("pretrained") and said.endswith(label) or f"turn {label}" in said
    assert page.js("return document.querySelector(arguments[0]).ariaValueText", f"#{slider}") == label


@pytest.mark.parametrize("kind", ["touch", "mouse"])
def test_a_picture_is_dragged(page, kind):
    if kind == "touch":
        page.resize(390, 844, touch=True)
    middle = PITCHES // 2 * YAWS + YAWS // 2
    assert index(page, frames("turntable", 3), YAWS * PITCHES) == middle
    page.drag(frames("turntable", 3), 0.45, 0, kind)  # to the right: the camera goes to the left
    assert index(page, frames("turntable", 2), YAWS * PITCHES) == middle - 2
    page.drag(frames("turntable", 2), -0.25, 0.45, kind)
    assert index(page, frames("turntable", 3), YAWS * PITCHES) == middle - 1 + YAWS
    page.drag(frames("interpolation", 1), 0.48, 0, kind)
    assert index(page, frames("interpolation", 2), 5) == 2


def test_photos_lead_to_their_place(page):
    assert page.js("return document.querySelector('[data-stop=\"0\"]').ariaPressed") == "true"
    page.click('[data-stop="4"]')
    assert index(page, frames("interpolation", 1), 5) == 4
    assert page.js("return [...document.querySelectorAll('[data-stop]')].map(s => s.ariaPressed)") == ["false", "true"]


def test_the_wipe_parts_photo_and_reconstruction(page):
    def halves():
        picture = Image.open(io.BytesIO(page.pixels("#heldout .pair"))).convert("RGB")
        return [picture.getpixel((picture.width * part // 8, picture.height // 2)) for part in (1, 3, 5, 7)]

    def colour(images, i):
        return tuple(round(float(c) * 127.5 + 127.5) for c in images[i, :, 0, 0])

    def near(seen, wanted):
        return all(abs(a - b) < 8 for a, b in zip(seen, wanted))

    photos, made = plain(3, 0.5), -plain(3, 0.5)
    assert all(near(*pair) for pair in zip(halves(), [colour(photos, 0)] * 2 + [colour(made, 0)] * 2))
    page.press("#heldout-1", "right", "right")
    assert all(near(*pair) for pair in zip(halves(), [colour(photos, 2)] * 2 + [colour(made, 2)] * 2))
    page.press("#heldout-0", "home")
    assert all(near(seen, colour(made, 2)) for seen in halves())
    page.drag("#heldout .pair", 0.25, 0, "touch")
    assert page.js("return Number(document.querySelector('#heldout-0').value)") == pytest.approx(37, abs=1)
    assert [near(seen, colour(photos, 2)) for seen in halves()] == [True, True, True, False]
    page.click("#heldout .check input")
    difference = [min(255, 4 * abs(a - b)) for a, b in zip(colour(photos, 2), colour(made, 2))]
    assert all(near(seen, difference) for seen in halves())


def test_it_plays_and_stops_when_told(page):
    position = "return Number(document.querySelector('#interpolation-0').value)"
    page.click("#interpolation .play")
    assert page.js("return document.querySelector('#interpolation .play').textContent") == "Pause"
    deadline = time.monotonic() + 20
    while page.js(position) == 0:
        assert time.monotonic() < deadline, "nothing moved within 20 s"
    page.press("#interpolation-0", "end")
    assert page.js("return document.querySelector('#interpolation .play').textContent") == "Play"
    assert {page.js(position) for _ in range(20)} == {4}


def test_the_viewer_opens_and_closes_by_keyboard(page):
    page.click("#heldout .thumb")
    assert page.js("return [viewer.open, viewer.querySelectorAll('figure').length]") == [True, 3]
    page.press("#viewer [data-close]", "right")
    assert page.js("return document.getElementById('viewer-title').textContent") == "b.png"
    page.click("#viewer [data-close]")
    assert page.js("return viewer.open") is False


@pytest.mark.parametrize(("width", "height", "touch"), [(1280, 900, False), (390, 844, True), (320, 640, True)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_at_any_width(page, tmp_path, width, height, touch, scheme):
    page.resize(width, height, touch)
    page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.js("return document.documentElement.scrollWidth") <= width
    small = (
        "return [...document.querySelectorAll('.controls :is(input[type=range], button)')]"
        ".map(e => e.getBoundingClientRect()).filter(b => b.height < 32 || b.width < 60 || b.right > innerWidth).length"
    )
    assert page.js(small) == 0, "every control is large enough for a finger"
    paper = page.js("return getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")
    assert (int(paper[0]) < 60) == (scheme == "dark")
    picture = Image.open(page.picture(tmp_path / "page.png"))
    assert picture.size == (width, height) and len(picture.convert("RGB").getcolors(2**24)) > 20
    page.cdp("Emulation.setEmulatedMedia", features=[])


def test_without_scripts_every_picture_is_there(page):
    page.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(page.path.as_uri())
        whole = Image.open(io.BytesIO(page.pixels(frames("turntable", 2) + " img"))).convert("RGB")
        reds = {round(whole.getpixel(((2 * x + 1) * whole.width // 10, (2 * y + 1) * whole.height // 6))[0] / 255 * 14)
                for x in range(YAWS) for y in range(PITCHES)}  # fmt: skip
        assert reds == set(range(YAWS * PITCHES)), "the sheet shows as a whole"
        assert page.js("return getComputedStyle(document.querySelector('.controls')).display") == "none"
    finally:
        page.cdp("Emulation.setScriptExecutionDisabled", value=False)
