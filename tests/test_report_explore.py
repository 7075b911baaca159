"""What the sliders of a page show: the right latents from the right cameras, drawn once; and a reopened run."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_generator, tiny_photos, write_tiny_album

pytest.importorskip("PIL")
from convlora import cli
from convlora.errors import ConvloraError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.images import to_uint8
from convlora.integrations.eg3d.report import Plan, best_spanned, explore, stages
from convlora.integrations.eg3d.report.stages import far_apart
from convlora.integrations.eg3d.tasks import make_hull, novel_views, personal_direction
from convlora.integrations.eg3d.tasks.directions import Direction

SMALL = Plan(yaws=3, pitches=3, photos=3, between=2, strengths=3)


@pytest.fixture(scope="module")
def scene():
    G = tiny_generator()
    photos = tiny_photos(5)
    anchors = torch.randn(5, G.w_dim, generator=torch.Generator().manual_seed(3))
    return G, anchors, list(zip(photos.names, photos.images))


def smile(G, seed=4):
    normal = torch.randn(G.w_dim, generator=torch.Generator().manual_seed(seed))
    return Direction(normal / normal.norm(), "smile", 1.0, 1.0)


def test_every_position_of_a_slider_is_the_picture_it_says(scene):
    G, anchors, originals = scene
    turn, edit, path = explore({"m": G}, make_hull(anchors), originals, [smile(G)], plan=SMALL, progress=False)
    assert [stage.name for stage in (turn, edit, path)] == ["turntable", "edit1", "interpolation"]
    orbit = cameras.orbit_of(G.rendering_kwargs)

    def drawn(w, yaw=0.0, pitch=0.0):
        pose = cameras.look_at(math.pi / 2 + yaw, cameras.vertical_angle(pitch), **orbit)
        return novel_views(G, w[None], cameras.label(pose))[0, 0]

    for y, pitch in enumerate((-SMALL.pitch, 0, SMALL.pitch)):
        for x, yaw in enumerate((-SMALL.yaw, 0, SMALL.yaw)):
            torch.testing.assert_close(turn.views["m"][x + 3 * y], drawn(anchors[0], yaw, pitch), atol=1e-4, rtol=0)
    assert [axis.labels for axis in turn.axes] == [["−26°", "0°", "+26°"], ["−9°", "0°", "+9°"]]

    visited = far_apart(anchors, 3)
    corners = anchors[visited]
    assert path.stops == [0, 2, 4] and [name.split(", ")[1] for name, _ in path.photos] == [
        originals[i][0] for i in visited
    ]
    for at, w in zip(range(5), (corners[0], corners[:2].mean(0), corners[1], corners[1:].mean(0), corners[2])):
        torch.testing.assert_close(path.views["m"][at], drawn(w), atol=1e-4, rtol=0)

    torch.testing.assert_close(edit.views["m"][1], drawn(anchors[0]), atol=2e-3, rtol=0)
    assert edit.axes[0].labels == ["−3 σ", "as it is", "+3 σ"] and edit.axes[0].start == 1
    assert not torch.equal(edit.views["m"][0], edit.views["m"][2])


def test_without_directions_or_neighbours_there_are_no_such_sliders(scene):
    G, anchors, originals = scene
    found = explore({"m": G}, make_hull(anchors[:1]), originals[:1], plan=SMALL, progress=False)
    assert [stage.name for stage in found] == ["turntable"]


def test_sheets_are_drawn_once_and_again_only_when_something_changed(scene, tmp_path, monkeypatch):
    G, anchors, originals = scene
    drawn = []
    real = stages.novel_views
    monkeypatch.setattr(stages, "novel_views", lambda *a, **k: drawn.append(1) or real(*a, **k))

    def run(model=G, first=0):
        drawn.clear()
        arguments = {"m": model}, make_hull(anchors), originals
        return explore(*arguments, first=first, plan=SMALL, folder=tmp_path, progress=False), len(drawn)

    made, count = run()
    assert count == 2
    again, count = run()
    assert count == 0
    for one, other in zip(made, again):
        assert torch.equal(one.views["m"], other.views["m"])
    free = explore({"m": G}, make_hull(anchors), originals, plan=SMALL, progress=False)
    for one, other in zip(made, free):
        assert torch.equal(to_uint8(one.views["m"]), to_uint8(other.views["m"])), "a PNG keeps every value"
    broken = next(tmp_path.glob("turntable*"))
    broken.write_bytes(broken.read_bytes()[:100])
    again, count = run()
    assert count == 1 and torch.equal(again[0].views["m"], made[0].views["m"])
    other = tiny_generator(7)
    (tmp_path / "mine.png").write_bytes(b"")
    assert run(other)[1] == 2 and len(list(tmp_path.iterdir())) == 2 + 1, "the old sheets are gone, and nothing else"
    assert run(other, first=1)[1] == 2


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**20))
def test_photos_far_apart(count, wanted, seed):
    w = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    chosen = far_apart(w, wanted, first=count - 1)
    assert chosen[0] == count - 1 and len(set(chosen)) == len(chosen) == min(count, wanted)
    if len(chosen) > 1:
        distance = (w - w[chosen[0]]).norm(dim=1)
        assert distance[chosen[1]] == distance.max()


def test_directions_are_chosen_by_what_the_anchors_span(scene):
    G, anchors, _ = scene
    hull = make_hull(anchors)
    inside = anchors[1] - anchors[0]
    directions = [smile(G, 5), Direction(inside / inside.norm(), "inside", 1.0, 1.0), smile(G, 6)]
    chosen = best_spanned(hull, directions, 2)
    assert chosen[0].attribute == "inside" and len(chosen) == 2
    assert personal_direction(hull, chosen[1].normal).cosine == max(
        personal_direction(hull, directions[i].normal).cosine for i in (0, 2)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"yaws": 0}, "yaws=0: at least 1"), ({"strengths": 4}, "strengths=4: at least 3, and odd")],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(ConvloraError, match=message):
        Plan(**changes)


def test_a_finished_run_gets_another_page(tmp_path, capsys):
    generator = eg3d.save_generator(tiny_generator(), tmp_path / "G.safetensors")
    album, out = write_tiny_album(tmp_path / "album", 5), tmp_path / "out"
    short = ["--anchor-steps", "2", "--steps", "2", "--held-out", "2", "--compare-full", "--quiet"]
    run = ["eg3d", "personalize", str(album), "--generator", str(generator), "--out", str(out), *short]
    assert cli.main([*run, "--perceptual", "none", "--identity", "none"]) == 0
    first = (out / "report.html").read_text()
    assert "Edit: " not in first and 'id="interpolation"' in first
    turned = {path.name for path in (out / "sheets").glob("turntable*")}
    assert len(turned) == 3
    smile(tiny_generator()).save(tmp_path / "smile.safetensors")
    capsys.readouterr()
    more = ["eg3d", "page", str(out), "--direction", str(tmp_path / "smile.safetensors"), "--quiet", "--json"]
    assert cli.main(more) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stages"] == ["Turn the head", "Edit: smile", "From photo to photo"]
    second = (out / "report.html").read_text()
    assert told["bytes"] == os.path.getsize(out / "report.html")
    # the models, read from their files, are those of the run: its sheets and its numbers are found again
    assert {path.name for path in (out / "sheets").glob("turntable*")} == turned
    start, end = '<section id="numbers"', '<section id="album"'
    assert first[first.index(start) : first.index(end)] == second[second.index(start) : second.index(end)]
    heldout = '<section id="heldout"', "</section>"
    parts = [page[page.index(heldout[0]) :].partition(heldout[1])[0] for page in (first, second)]
    assert parts[0] == parts[1]

    assert (
        cli.main(["eg3d", "page", str(out), "--photo", "photo_03.png", "--yaws", "2", "--pitches", "1", "--quiet"]) == 0
    )
    assert "The head of photo_03.png" in (out / "report.html").read_text()
    capsys.readouterr()
    for arguments, message in (
        (["--photo", "nobody.png"], "no anchor of 'nobody.png'"),
        (["--yaws", "99"], "--yaws 99: from 1 to 60 views"),
        (["--direction", str(out / "anchors.safetensors")], "holds no direction"),
    ):
        assert cli.main(["eg3d", "page", str(out), "--quiet", *arguments]) == 2
        assert message in capsys.readouterr().err
    (album / "photo_03.png").unlink()
    labels = json.loads((album / "dataset.json").read_text())["labels"]
    (album / "dataset.json").write_text(json.dumps({"labels": [one for one in labels if one[0] != "photo_03.png"]}))
    assert cli.main(["eg3d", "page", str(out), "--quiet"]) == 2
    assert "has lost photo_03.png" in capsys.readouterr().err
    (out / "report.json").write_text("{}")
    assert cli.main(["eg3d", "page", str(out), "--quiet"]) == 2
    assert "no report.json of a run" in capsys.readouterr().err
