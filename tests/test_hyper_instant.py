"""A person from one photo: prediction, tuning, one exact adapter, its folder, and the commands for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import tiny_generator, tiny_photos, write_tiny_album

import convlora
from convlora import Adapter, cli, files
from convlora.errors import ConvloraError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.hyper import HyperNetwork, instant
from convlora.integrations.eg3d.hyper.codes import put, squares
from convlora.integrations.eg3d.hyper.instant import predict
from convlora.integrations.eg3d.images import save_png
from convlora.integrations.eg3d.personal import load_personal
from convlora.integrations.eg3d.personalize import narrow, tune
from convlora.integrations.eg3d.tasks import novel_views

SMALL = dict(dim=16, heads=2, depth=1, decoder_depth=1, refinements=2, side=32, patch=16)
QUIET = dict(progress=False)


@pytest.fixture(scope="module")
def hyper() -> HyperNetwork:
    """One whose predictions can be seen."""
    torch.manual_seed(0)
    net = HyperNetwork.for_generator(tiny_generator(), **SMALL)
    with torch.no_grad():
        net.heads.normal_(std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture
def G():
    return tiny_generator()


@pytest.fixture(scope="module")
def anchors() -> Anchors:
    return find_anchors(tiny_generator(), tiny_photos(1), 2, **QUIET)


def view(G, anchors: Anchors) -> torch.Tensor:
    return novel_views(G, anchors.w, cameras.random_views(2, seed=1))


def test_prediction_and_tuning_are_one_exact_adapter(G, hyper, anchors, tmp_path) -> None:
    photo = tiny_photos(1)
    before = {key: value.clone() for key, value in G.state_dict().items()}
    plain = view(G, anchors)
    codes = predict(G, photo, anchors, hyper)
    assert float(squares(codes).max()) > 1e-4
    done = instant(G, photo, hyper, anchors=anchors, steps=3, **QUIET)
    assert Adapter.names(G) == ["default"] and done.adapter.method == "lora" and not done.adapter.trained
    assert all(torch.equal(a, b) for a, b in zip(done.codes, codes))
    assert set(done.seconds) == {"inversion", "prediction", "tuning"} and min(done.seconds.values()) >= 0
    # the base is untouched, and the parts together are what was tuned: merged prediction, LoRA on top
    base = {key: value for key, value in G.state_dict().items() if ".convlora." not in key}
    assert all(torch.equal(value, before[key]) for key, value in base.items()) and set(base) == set(before)
    twin = tiny_generator()
    predicted = hyper.inject(twin)
    put(predicted, codes)
    deltas = {name: predicted.delta(name) for name in hyper.layout.names}
    predicted.merge()
    torch.manual_seed(0)
    ranks = narrow(twin, 4)
    tuned = convlora.inject_lora(twin, 4, targets=list(hyper.layout.names), ranks=ranks, name="tuned")
    tune(twin, photo, anchors, [{"params": list(tuned.parameters()), "lr": 0.004}], steps=3, batch_size=1, **QUIET)
    assert torch.allclose(view(twin, anchors), view(G, anchors), atol=1e-5)
    for name in hyper.layout.names:
        delta = deltas[name] + tuned.delta(name).detach()
        assert torch.allclose(done.adapter.delta(name), delta, atol=1e-5 * max(1.0, float(delta.abs().max())))
    assert float((view(G, anchors) - plain).abs().max()) > 1e-2
    path = done.save(tmp_path / "me.safetensors", person="me", consent="given")
    fresh = tiny_generator()
    convlora.load_adapter(fresh, path)
    assert torch.equal(view(fresh, anchors), view(G, anchors))
    assert files.read(path)[1]["person"] == "me" and files.read(path)[1]["consent"] == "given"


def test_ranks_add_up_to_the_layers_limits(G, hyper, anchors) -> None:
    done = instant(G, tiny_photos(1), hyper, anchors=anchors, steps=1, rank=4, **QUIET)
    limits = {row.name: row.max_rank for row in convlora.adaptable(tiny_generator(), list(hyper.layout.names))}
    ranks = {name: pair[0] for name, pair in done.adapter.record.ranks.items()}
    assert ranks == {name: min(5, limit) for name, limit in limits.items()}
    assert min(limits.values()) == 3 and narrow(tiny_generator(), 4).keys() == {n for n, r in limits.items() if r < 4}


def test_ablations_leave_parts_away(hyper, anchors) -> None:
    photo, plain = tiny_photos(1), view(tiny_generator(), anchors)
    seen = {}
    for name, arguments in {
        "only": dict(hyper=hyper, steps=0), "once": dict(hyper=hyper, steps=0, refinements=1),
        "without": dict(hyper=None, steps=2),
    }.items():  # fmt: skip
        model = tiny_generator()
        done = instant(model, photo, anchors=anchors, **arguments, **QUIET)
        seen[name] = view(model, anchors)
        assert (done.codes is None) == (name == "without")
        expected = {"only": 1, "once": 1, "without": 4}[name]
        assert max(pair[0] for pair in done.adapter.record.ranks.values()) == expected
    assert all(float((x - plain).abs().max()) > 1e-4 for x in seen.values())
    assert float((seen["only"] - seen["once"]).abs().max()) > 1e-4
    # the prediction alone is the codes', put into an adapter of their own
    model = tiny_generator()
    put(hyper.inject(model), predict(model, photo, anchors, hyper))
    assert torch.allclose(view(model, anchors), seen["only"], atol=1e-5)


def test_what_cannot_be_is_refused_and_leaves_the_generator_alone(G, hyper, anchors) -> None:
    keys = list(G.state_dict())
    with pytest.raises(ConvloraError, match="from one photo, not 2"):
        instant(G, tiny_photos(2), hyper, **QUIET)
    with pytest.raises(ConvloraError, match="nothing would change: give one of them"):
        instant(G, tiny_photos(1), None, anchors=anchors, steps=0, **QUIET)
    with pytest.raises(ConvloraError, match="refine_camera: options of an inversion, and anchors are given"):
        instant(G, tiny_photos(1), hyper, anchors=anchors, refine_camera="full", **QUIET)
    with pytest.raises(ConvloraError, match=r"the anchor is of other.png and the photo is photo_00.png"):
        instant(G, tiny_photos(1), hyper, anchors=anchors._replace(names=["other.png"]), **QUIET)
    with pytest.raises(ConvloraError, match="trained for another generator"):
        instant(tiny_generator(seed=1), tiny_photos(1), hyper, anchors=anchors, **QUIET)
    bad = anchors._replace(w=anchors.w * float("nan"))
    with pytest.raises(ConvloraError, match="diverged at step 1"):
        instant(G, tiny_photos(1), None, anchors=bad, steps=1, **QUIET)
    assert list(G.state_dict()) == keys and Adapter.names(G) == []


def test_padded_pixels_do_not_reach_the_network(G, hyper, anchors) -> None:
    photo = tiny_photos(1)
    masks = torch.ones(1, 1, 128, 128)
    masks[..., :50] = 0
    painted = photo.images.clone()
    painted[..., :50] = 1
    both = [
        predict(G, Photos(images, photo.labels, photo.names, masks), anchors, hyper)
        for images in (photo.images, painted)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*both))


# ------------------------------------------------------------------------------------------------ from the shell


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Two albums, a generator, and a hypernetwork that the shell trained on them."""
    folder = tmp_path_factory.mktemp("shelf")
    base = eg3d.save_generator(tiny_generator(), folder / "base.safetensors")
    for name in ("ann", "bob"):
        write_tiny_album(folder / name, 3)
    albums = [str(folder / name) for name in ("ann", "bob")]
    command = [
        "eg3d", "hypernetwork", *albums, "--generator", str(base), "--out", str(folder / "hyper.safetensors"),
        "--steps", "3", "--taught", "2", "--taught-steps", "2", "--anchor-steps", "2", "--batch-size", "2",
        "--perceptual", "none", "--identity", "none", "--quiet",
    ]  # fmt: skip
    assert cli.main(command) == 0
    return folder


def run(shelf: Path, out: Path, *more: str, photo: str = "ann/photo_01.png") -> list[str]:
    return [
        "eg3d", "instant", str(shelf / photo), "--generator", str(shelf / "base.safetensors"), "--out", str(out),
        "--anchor-steps", "2", "--perceptual", "none", "--quiet", *more,
    ]  # fmt: skip


def test_a_hypernetwork_is_trained_from_the_shell_and_goes_on_where_it_stopped(shelf, capsys) -> None:
    net = HyperNetwork.load(shelf / "hyper.safetensors")
    assert net.layout.numbers > 0 and files.read(shelf / "hyper.safetensors")[1]["generator"].endswith(
        "base.safetensors"
    )
    work = shelf / "hyper.work"
    assert {"anchors_00000.safetensors", "anchors_00001.safetensors", "codes.safetensors", "train.ckpt"} <= {
        path.name for path in work.iterdir()
    }
    before = files.read(shelf / "hyper.safetensors")
    command = json.loads((work / "run.json").read_text())
    again = [
        "eg3d", "hypernetwork", *command["albums"], "--generator", command["generator"], "--out",
        str(shelf / "hyper.safetensors"), "--steps", "3", "--taught", "2", "--taught-steps", "2", "--anchor-steps", "2",
        "--batch-size", "2", "--perceptual", "none", "--identity", "none", "--quiet", "--json",
    ]  # fmt: skip
    capsys.readouterr()
    assert cli.main(again) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["photos"] == 6 and told["people"] == 2 and set(told["losses"]) == {"pictures", "codes", "identity"}
    tensors, metadata = files.read(shelf / "hyper.safetensors")
    assert metadata == before[1] and all(torch.equal(value, before[0][key]) for key, value in tensors.items())


def test_one_photo_becomes_a_folder_that_the_tasks_open(shelf, tmp_path, capsys) -> None:
    out = tmp_path / "me"
    command = run(shelf, out, "--hypernetwork", str(shelf / "hyper.safetensors"), "--steps", "2", "--views", "2",
                  "--consent", "she agreed", "--json")  # fmt: skip
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (out / "adapter.safetensors").stat().st_size
    assert set(told["seconds"]) == {"inversion", "prediction", "tuning"}
    metadata = files.read(out / "adapter.safetensors")[1]
    assert metadata["person"] == "ann" and metadata["consent"] == "she agreed"
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 3 * 128
    me = load_personal(out)
    assert me.anchors.names == ["photo_01.png"] and Adapter.names(me.G) == ["default"]
    assert me.album == (shelf / "ann").resolve()
    film = tmp_path / "film.gif"
    assert cli.main(["eg3d", "render", str(out), "--frames", "2", "--out", str(film), "--quiet"]) == 0
    assert film.stat().st_size > 100
    # the same command again finds all of it done
    before = (out / "adapter.safetensors").read_bytes()
    assert cli.main(command) == 0 and (out / "adapter.safetensors").read_bytes() == before
    capsys.readouterr()
    assert cli.main([*command[:-1], "--rank", "2"]) == 2
    assert "rank: 4 there, 2 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "there is no hypernetwork for .*base.safetensors: --hypernetwork FILE"),
        (("--hypernetwork", "none", "--steps", "0"), "nothing would change; give one of them"),
        (("--hypernetwork", "none", "--landmarks", "x.json"), "is of an album, with its camera"),
        (("--hypernetwork", "none", "--rank", "0"), "--rank 0: at least 1 is needed"),
        (("--hypernetwork", "missing.safetensors"), "no such file: missing.safetensors"),
    ],
)
def test_wrong_commands_say_why_and_leave_no_folder(shelf, tmp_path, capsys, more, message) -> None:
    assert cli.main(run(shelf, tmp_path / "out", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_photo_that_is_not_there_is_named(shelf, tmp_path, capsys) -> None:
    assert cli.main(run(shelf, tmp_path / "out", photo="ann/none.png")) == 2
    assert "no photo at" in capsys.readouterr().err


def test_a_raw_photo_is_prepared_first(shelf, tmp_path) -> None:
    """Landmarks of a drawn head, as the user's own file of them."""
    from convlora.integrations.eg3d.lab import people, world

    person = people.evaluation_people(1)[0]
    shot = people.photos(person, "train", 1, 256)
    points = world.landmarks(shot.params, shot.traits, cameras.split_label(shot.labels)[0], None)[0] * 256
    folder = tmp_path / "raw"
    folder.mkdir()
    save_png(folder / "me.png", shot.images[0])
    (tmp_path / "points.json").write_text(json.dumps({"me.png": points.tolist()}))
    out = tmp_path / "out"
    command = run(shelf, out, "--hypernetwork", "none", "--steps", "1", "--species", "lab", "--landmarks",
                  str(tmp_path / "points.json"), "--person", "me", "--views", "0")  # fmt: skip
    command[2] = str(folder / "me.png")
    assert cli.main(command) == 0
    me = load_personal(out)
    assert me.album == (out / "album").resolve() and me.anchors.labels is not None, "its camera is a measurement"
    assert files.read(out / "adapter.safetensors")[1]["person"] == "me"


def test_without_a_shipped_hypernetwork_the_lab_asks_for_one(tmp_path, monkeypatch, capsys) -> None:
    from convlora.integrations.eg3d.lab import hyper as lab_hyper

    album = write_tiny_album(tmp_path / "album", 1)
    monkeypatch.setattr(lab_hyper, "shipped", lambda: tmp_path / "none.safetensors")
    assert cli.main(["eg3d", "instant", str(album / "photo_00.png"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "there is no hypernetwork for lab: --hypernetwork FILE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
