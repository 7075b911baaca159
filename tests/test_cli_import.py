"""`convlora eg3d import` and `convlora stylegan2 import`: into a folder that loads, once, as a whole."""

from __future__ import annotations

import hashlib
import json

import official_format as official
import pytest
import torch
from hostile_pickles import HOSTILE
from safetensors import safe_open
from test_official_pickles import eg3d_images, randomized, tiny_stylegan2
from test_sources import bare, image, rosinality_state
from tiny import tiny_generator

from convlora import cli
from convlora.errors import FileError
from convlora.integrations import eg3d, stylegan2


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, status=0):
        assert cli.main([*map(str, arguments), "--json"]) == status
        out = capsys.readouterr().out
        return json.loads(out)

    return run


@pytest.fixture
def snapshot(tmp_path):
    G = randomized(tiny_generator())
    saved = official.eg3d_network(G, neural_rendering_resolution=24)
    saved.meta["state"]["rendering_kwargs"] |= {"avg_camera_pivot": [0, 0, 0.2]}
    return official.write(tmp_path / "ffhqrebalanced512-128.pkl", official.snapshot(saved))


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_an_eg3d_pickle_becomes_a_folder_that_loads(run, snapshot, tmp_path):
    data = run("eg3d", "import", snapshot.name, "out/face")
    sha = hashlib.sha256(snapshot.read_bytes()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "out" / "face").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["face"], "nothing temporary is left"
    config = data.pop("config")
    G = eg3d.load_generator(snapshot)
    assert data == {
        "class": "TriPlaneGenerator", "resolution": 128, "parameters": sum(p.numel() for p in G.parameters()),
        "num_ws": G.num_ws, "neural_rendering_resolution": 24, "super_resolution": "SuperresolutionHybrid2X",
        "camera_pivot": [0, 0, 0.2], "camera_radius": 2.7, "source": snapshot.name, "source_sha256": sha,
        "licence": "NVIDIA Source Code License (non-commercial) if these are NVIDIA's weights: see their source",
        "file": "out/face/model.safetensors", "was_there": False,
    }  # fmt: skip
    assert json.loads((tmp_path / "out/face/config.json").read_text()) == config == G.config
    told = metadata("out/face/model.safetensors")
    assert json.loads(told["config"]) == config and told["source_sha256"] == sha and told["source"] == snapshot.name
    assert told["class_name"] == "TriPlaneGenerator" and told["license"].startswith("NVIDIA Source Code License")
    (tmp_path / "alone").mkdir()
    (tmp_path / "out/face/model.safetensors").rename(tmp_path / "alone/x.safetensors")
    H = eg3d.load_generator(tmp_path / "alone/x.safetensors")
    assert H.neural_rendering_resolution == 24
    assert torch.equal(eg3d_images(H)["image"], eg3d_images(G)["image"])


def test_a_second_import_of_the_same_changes_nothing_and_of_another_is_refused(run, snapshot, tmp_path):
    run("eg3d", "import", snapshot, "face")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "face").iterdir()}
    assert run("eg3d", "import", snapshot, "face")["was_there"] is True
    other = official.write(tmp_path / "other.pkl", official.snapshot(official.eg3d_network(tiny_generator(seed=5))))
    assert "face holds something else already" in run("eg3d", "import", other, "face", status=2)["error"]
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "face").iterdir()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "notes holds something else" in run("eg3d", "import", snapshot, "notes", status=2)["error"]
    assert "is a file; OUT is a new folder" in run("eg3d", "import", snapshot, snapshot, status=2)["error"]
    (tmp_path / "empty").mkdir()
    assert run("eg3d", "import", snapshot, "empty")["was_there"] is False


def test_an_import_that_fails_leaves_no_folder(run, snapshot, tmp_path, monkeypatch):
    (tmp_path / "evil.pkl").write_bytes(HOSTILE["os.system"][0])
    assert "names os.system" in run("eg3d", "import", "evil.pkl", "out", status=2)["error"]

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(eg3d.checkpoint, "write_checkpoint", full)
    assert "disk full" in run("eg3d", "import", snapshot, "out", status=2)["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pkl", snapshot.name]


def test_stylegan2_of_three_forms_gives_the_same_images(run, tmp_path):
    G = tiny_stylegan2()
    official.write(tmp_path / "a.pkl", official.snapshot(official.stylegan2_network(G)), 3)
    bare(G, tmp_path / "b.safetensors")
    torch.save({"g_ema": rosinality_state(G), "latent_avg": G.mapping.w_avg}, tmp_path / "c.pt")
    for source in ("a.pkl", "b.safetensors", "c.pt"):
        data = run("stylegan2", "import", source, f"out-{source[0]}")
        assert data["resolution"] == 32 and data["num_ws"] == 8 and "camera_radius" not in data
        assert ("NVIDIA" in data["licence"]) == (source == "a.pkl")
        H = stylegan2.load_generator(f"out-{source[0]}")
        assert torch.equal(image(H), image(G))
        info = run("info", f"out-{source[0]}/model.safetensors")
        assert info["model"] == "Generator"


def test_half_precision_becomes_float32(run, tmp_path):
    G = tiny_stylegan2().half()
    bare(G, tmp_path / "half.safetensors")
    run("stylegan2", "import", "half.safetensors", "out")
    with safe_open("out/model.safetensors", "pt") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.float32"}


def test_presets_from_the_command_line(run, tmp_path, monkeypatch):
    G = randomized(tiny_generator())
    monkeypatch.setitem(eg3d.CONFIGS, "tiny-16", G.config)
    monkeypatch.setitem(eg3d.CONFIGS, "tiny-24", G.config | {"neural_rendering_resolution": 24})
    bare(G, tmp_path / "g.safetensors")
    assert "--preset tiny-24" in run("eg3d", "import", "g.safetensors", "out", status=2)["error"]
    assert run("eg3d", "import", "g.safetensors", "out", "--preset", "tiny-24")["neural_rendering_resolution"] == 24
    assert metadata("out/model.safetensors")["preset"] == "tiny-24"
    assert "no preset 'x'; there are" in run("eg3d", "import", "g.safetensors", "o", "--preset", "x", status=2)["error"]


def test_the_text_for_people(snapshot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eg3d", "import", snapshot.name, "face"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "face/model.safetensors: written"
    assert "  neural rendering resolution: 24" in lines and "  camera pivot: [0, 0, 0.2]" in lines
    assert any(line.startswith("  licence: NVIDIA Source Code License") for line in lines)
    assert cli.main(["eg3d", "import", snapshot.name, "face"]) == 0
    assert "the same import lies here already" in capsys.readouterr().out
    with pytest.raises(FileError, match="eg3d.load_generator"):
        stylegan2.load_generator("face")
