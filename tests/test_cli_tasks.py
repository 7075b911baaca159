"""The tasks from the shell: each opens a finished run and leaves pictures one can look at."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_generator, tiny_photos, write_tiny_album

from convlora import cli, files
from convlora.integrations import eg3d
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.batches import Kept
from convlora.integrations.eg3d.personal import load_personal
from convlora.integrations.eg3d.personalize import inject_personal
from convlora.integrations.eg3d.tasks.directions import Direction


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder as `personalize` leaves it, of a tiny generator."""
    folder = tmp_path_factory.mktemp("run")
    G = tiny_generator()
    base = eg3d.save_generator(G, folder / "base.safetensors")
    album = write_tiny_album(folder / "photos")
    photos = tiny_photos(4)
    w = torch.randn(4, 8)
    moved = photos.labels.clone()
    moved[:, 3] += 0.25
    Anchors(w, photos.names, torch.zeros(4), moved, torch.ones(4)).save(folder / "anchors.safetensors")
    inject_personal(G).save(folder / "adapter.safetensors", person="me")
    (folder / "run.json").write_text(json.dumps({"generator": str(base), "album": str(album)}))
    return folder


@pytest.fixture(scope="module")
def wrong(run, tmp_path_factory) -> dict[str, Path]:
    """Runs of one photo and of another generator's latents, a direction of that, masks of all wrong kinds."""
    folder = tmp_path_factory.mktemp("wrong")
    names = tiny_photos(4).names
    for name, anchors in (
        ("alone", Anchors(torch.randn(1, 8), names[:1], torch.zeros(1))),
        ("other", Anchors(torch.randn(4, 512), names, torch.zeros(4))),
    ):
        shutil.copytree(run, folder / name)
        anchors.save(folder / name / "anchors.safetensors")
    wide = Direction(torch.ones(512) / 512**0.5, "width", 1.0, 1.0).save(folder / "wide.safetensors")
    for name, side, grey in (("small", 64, 0), ("full", 128, 255), ("empty", 128, 0)):
        (folder / "masks" / name).mkdir(parents=True)
        for photo in names:
            Image.new("L", (side, side), grey).save(folder / "masks" / name / photo)
    return {"alone": folder / "alone", "other": folder / "other", "wide": wide, "masks": folder / "masks"}


def call(capsys, *arguments: object) -> dict:
    assert cli.main(["eg3d", *map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("suffix", ["webp", "gif", "mp4"])
def test_render(run, tmp_path, capsys, suffix) -> None:
    found = call(capsys, "render", run, "--frames", 3, "--photo", "photo_01.png", "--out", tmp_path / f"me.{suffix}")
    assert Path(found["path"]).stat().st_size > 500 and found["frames"] == 3


def test_interpolate(run, tmp_path, capsys) -> None:
    found = call(capsys, "interpolate", run, "--weights", 3, "--out", tmp_path)
    with Image.open(found["path"]) as sheet:
        assert sheet.width > 3 * 128 and Path(found["film"]).is_file()


def test_synthesize_score_and_edit(run, tmp_path, capsys) -> None:
    samples = tmp_path / "new"
    found = call(capsys, "synthesize", run, "--count", 24, "--frontal", "--dilation", 2, "--out", samples)
    assert found["pictures"] == 24 and len(list(samples.glob("*.png"))) == 24
    scores = tmp_path / "scores.csv"
    brightness = []
    for path in sorted(samples.glob("*.png")):
        with Image.open(path) as picture:
            brightness.append((path.name, picture.convert("L").resize((1, 1)).getpixel((0, 0))))
    lines = [f"{name},{value + i / 100}" for i, (name, value) in enumerate(brightness)]
    scores.write_text("\n".join(["name,score", *lines]))
    direction = tmp_path / "bright.safetensors"
    told = call(capsys, "direction", samples, "--scores", scores, "--attribute", "brightness", "--share", 0.3,
                "--out", direction)  # fmt: skip
    assert told["attribute"] == "brightness" and 0 <= told["accuracy"] <= 1
    edited = call(capsys, "edit", run, "--direction", direction, "--strengths=-1:1:3", "--out", tmp_path / "ed")
    assert edited["inside"] == [True, True, True] and 0 < edited["cosine"] <= 1
    scores.write_text("\n".join(f"{name},1.5" for name, _ in brightness))
    again = [
        "eg3d",
        "direction",
        str(samples),
        "--scores",
        str(scores),
        "--attribute",
        "x",
        "--out",
        str(tmp_path / "y"),
    ]
    assert cli.main(again) == 2 and not (tmp_path / "y").exists()
    assert "all 24 scores of 'x' are 1.5" in capsys.readouterr().err
    scores.write_text("\n".join(lines[:5]))
    assert cli.main(["eg3d", "direction", str(samples), "--scores", str(scores), "--attribute", "x", "--out", "y"]) == 2
    assert "scores 5 of the 24 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("invert", "--steps", 2, "--tune-steps", 2, "--views", 1),
        ("project", "--steps", 2, "--per-layer"),
        ("inpaint", "--steps", 2, "--hole", 0.3),
        ("upscale", "--steps", 2, "--factor", 4, "--how", "blur"),
    ],
    ids=lambda a: a[0],
)
def test_tasks_on_an_album_go_on_and_refuse_other_options(run, tmp_path, capsys, monkeypatch, arguments) -> None:
    verb, *rest = arguments
    out = tmp_path / verb
    command = (verb, run, run / "photos", "--limit", 2, *rest, "--out", out)
    saved = Kept.write

    def interrupted(*results) -> None:
        saved(*results)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", interrupted)
        assert cli.main(["eg3d", *map(str, command), "--quiet"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    kept = next(out.glob("*.safetensors"))
    before = kept.read_bytes(), kept.stat().st_mtime_ns
    found = call(capsys, *command)
    assert found["photos"] == 2 and (kept.read_bytes(), kept.stat().st_mtime_ns) == before
    assert {"photo_00.png", "photo_01.png", "sheet.png"} <= {p.name for p in out.iterdir()}
    assert cli.main(["eg3d", *map(str, command), "--seed", "1", "--quiet"]) == 2
    assert "(seed: 0 there, 1 now)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_goes_on_in_another(run, tmp_path, capsys) -> None:
    out = tmp_path / "filled"
    command = ("inpaint", run, write_tiny_album(tmp_path / "many", 12), "--steps", 4, "--hole", 0.3, "--out", out)
    code = "import sys; from convlora.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, "eg3d", *map(str, command), "--quiet"])
    kept = out / "coefficients.safetensors"
    deadline = time.monotonic() + 120
    while not kept.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "killed between the first batch and the second"
    assert json.loads(files.read(kept)[1]["names"]) == [f"photo_{i:02d}.png" for i in range(8)]
    half = files.read(kept)[0]["alpha"]
    call(capsys, *command)
    whole = files.read(kept)[0]["alpha"]
    assert whole.shape == (12, 4) and torch.equal(whole[:8], half)


def test_refined_cameras_of_the_run_are_used_for_its_own_album_only(run, tmp_path) -> None:
    me = load_personal(run)
    assert torch.equal(me.photos(run / "photos").labels, me.anchors.labels)
    other = write_tiny_album(tmp_path / "other")
    assert torch.allclose(me.photos(other).labels, tiny_photos(4).labels)


def test_pretrained_leaves_the_adapter_away(run) -> None:
    import convlora

    assert not [m for m in load_personal(run, pretrained=True).G.modules() if type(m).__name__.startswith("Adapted")]
    assert convlora.Adapter.of(load_personal(run).G).num_parameters > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("render", "{empty}", "--out", "x.mp4"), "no finished run"),
        (("render", "{run}", "--photo", "nobody.png", "--out", "x.mp4"), "no anchor of 'nobody.png'"),
        (("render", "{run}", "--out", "x.avi"), "x.avi"),
        (("mesh", "{run}", "--resolution", "16", "--level", "1e9", "--out", "x.ply"), "no surface"),
        (("edit", "{run}", "--direction", "{run}/anchors.safetensors", "--out", "x"), "no direction"),
        (("upscale", "{run}", "{run}/photos", "--factor", "7", "--out", "x"), "--factor 7"),
        (("inpaint", "{run}", "{run}/photos", "--masks", "{empty}", "--out", "x"), "no mask for photo_00.png"),
        (("synthesize", "{run}", "--support", "9", "--out", "{empty}/s"), "support=9"),
        (("interpolate", "{run}", "--start", "photo_00.png", "--end", "photo_00.png", "--out", "x"), "two photos"),
        (("interpolate", "{run}", "--weights", "1", "--out", "x"), "weights=1"),
        (("interpolate", "{alone}", "--out", "x"), "a line needs two photos"),
        (("project", "{alone}", "{run}/photos", "--out", "x"), "at least 2 photos"),
        (("edit", "{alone}", "--direction", "{wide}", "--out", "x"), "at least 2 photos"),
        (("edit", "{run}", "--direction", "{wide}", "--out", "x"), "(512,)"),
        (("inpaint", "{run}", "{run}/photos", "--masks", "{masks}/small", "--out", "x"), "64×64"),
        (("inpaint", "{run}", "{run}/photos", "--masks", "{masks}/full", "--out", "x"), "no hole in photo_00.png"),
        (("inpaint", "{run}", "{run}/photos", "--masks", "{masks}/empty", "--out", "x"), "nothing of photo_00.png"),
        (("inpaint", "{run}", "{run}/photos", "--hole", "1.5", "--out", "x"), "share=1.5"),
        (("inpaint", "{run}", "{run}/photos", "--hole", "0.001", "--out", "x"), "share=0.001"),
        (("invert", "{run}", "{run}/photos", "--limit", "9", "--out", "x"), "has 4 photos"),
        (("upscale", "{run}", "{run}/photos", "--limit", "0", "--out", "x"), "--limit 0"),
        (("project", "{run}", "{empty}", "--out", "x"), "holds no photos"),
        (("project", "{run}", "{run}/photos", "--steps", "0", "--out", "x"), "--steps 0"),
        (("project", "{run}", "{run}/photos", "--dilation", "0.5", "--out", "x"), "dilation is 0.5"),
        (("invert", "{run}", "{run}/photos", "--views", "-1", "--out", "x"), "--views -1"),
        (("render", "{other}", "--out", "x.mp4"), "views need w"),
        (("upscale", "{other}", "{run}/photos", "--out", "x"), "512 wide"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_wrong_input_is_one_line(run, wrong, tmp_path, capsys, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["eg3d", *(a.format(run=run, empty=empty, **wrong) for a in arguments), "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.splitlines()[-1].startswith("convlora: ")
    assert not list(tmp_path.glob("x*"))
