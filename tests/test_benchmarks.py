"""The programs in benchmarks/: what they count and measure is what they say, and each writes its figures and plot."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_generator, write_tiny_album
from torch import nn

from convlora.integrations import eg3d

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    """The module of a program, imported as the program imports its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def person(tmp_path):
    """Options for a tiny generator and an album of three photos."""
    file = eg3d.save_generator(tiny_generator(), tmp_path / "tiny.safetensors")
    return ["--generator", str(file), "--album", str(write_tiny_album(tmp_path / "album", 3))]


def run(module, out: Path, *options: str) -> tuple[dict, list[dict]]:
    """What the program wrote: the environment and the rows."""
    module.main([*options, "--out", str(out)])
    name = module.__name__
    found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    with Image.open(out / f"{name}.png") as image:
        assert image.format == "PNG" and min(image.size) > 100
        assert len(image.convert("L").getcolors()) > 10, "something is drawn"
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.png"]
    assert {"date", "cpu", "threads", "torch", "command"} <= set(found["environment"])
    return found["environment"], found["rows"]


def by_variant(rows: list[dict], network: str) -> dict[str, dict]:
    return {row["variant"]: row for row in rows if row["network"] == network}


# ---- what they share


def test_multiplications_are_those_of_the_textbook(program):
    count = program("_common").count
    x = torch.randn(2, 4, 9, 8)
    weight = torch.randn(6, 2, 3, 3)
    assert count(lambda: F.conv2d(x, weight, padding=1, groups=2)).multiplications == 2 * 72 * 6 * 2 * 9
    assert count(lambda: F.conv2d(x, weight, stride=2, groups=2)).multiplications == 2 * 4 * 3 * 6 * 2 * 9
    up = nn.ConvTranspose2d(4, 6, 4, 2, 1)
    assert count(lambda: up(x)).multiplications == 2 * 72 * 4 * 6 * 16
    assert count(lambda: up(x).sum().backward()).multiplications == 2 * 2 * 72 * 4 * 6 * 16, "forward and grad_W"
    y = x.clone().requires_grad_()
    assert count(lambda: up(y).sum().backward()).multiplications == 3 * 2 * 72 * 4 * 6 * 16, "and grad_x"
    a, b = torch.randn(3, 5), torch.randn(7, 5)
    assert count(lambda: F.linear(a, b)).multiplications == 105
    assert count(lambda: F.linear(a, b, torch.randn(7))).multiplications == 105
    assert count(lambda: torch.randn(2, 3, 5) @ torch.randn(2, 5, 7)).multiplications == 210


def test_bytes_are_those_that_operations_read_and_write(program):
    count = program("_common").count
    a, b = torch.randn(10, 10), torch.randn(10, 10)
    assert count(lambda: a + b)[1:] == (3 * 400, 1)
    assert count(lambda: a.t().flatten()[:50].view(5, 10)).bytes == 2 * 400, "a copy; views are free"
    assert count(lambda: torch.randn(1).expand(1000).sum()).bytes < 100, "an expanded tensor is as large as its memory"


def test_every_round_runs_everything_once_and_begins_with_another(program):
    common = program("_common")
    ran: list[str] = []
    actions = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    times = common.interleaved(actions, 3, "cpu", between=lambda: ran.append("-"))
    assert "".join(ran) == "-a-b-c-b-c-a-c-a-b-a-b-c"
    assert all(len(t) == 3 for t in times.values())


def test_a_ratio_is_the_median_of_those_within_a_round(program):
    times = {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]}
    assert program("_common").ratio(times, "a", "b") == 3.0, "the medians' own ratio is 4"


def test_the_cpus_clock_does_not_count_waiting(program):
    common = program("_common")
    for clock, least, most in (("cpu", 0, 0.1), ("wall", 0.2, 60)):
        common.prepare(common.arguments("", 1).parse_args(["--clock", clock]))
        assert least <= common.seconds(lambda: time.sleep(0.2), "cpu") < most


def test_peak_memory_of_a_cpu_is_what_was_held_at_once(program):
    peak = program("memory").peak_of_cpu
    x = torch.randn(256, 1024)  # 1 MiB
    kept = []
    assert peak(lambda: kept.append(x + 1)) == pytest.approx(1 << 20, abs=64), "and the number 1"
    assert peak(lambda: (x + 1) + (x + 2)) == pytest.approx(3 << 20, abs=64), "two temporaries and the sum"
    assert peak(lambda: [x + 1 for _ in range(4)] and None) == pytest.approx(4 << 20, abs=64)
    assert peak(lambda: [(x + 1).sum() for _ in range(4)]) == pytest.approx(1 << 20, abs=64), "each freed in turn"
    assert peak(lambda: kept.clear()) == 0, "what was there before is not counted"


def test_a_row_without_the_ratio_has_no_bar(program, tmp_path):
    common = program("_common")
    told = {"torch": "2", "device": "cpu", "date": "today"}
    common.write(tmp_path, "some", told, [{"n": "a", "r": 2.0}, {"n": "b"}, {"n": "c", "r": None}], "{n}", "r", "what")
    assert len(json.loads((tmp_path / "some.json").read_text())["rows"]) == 3 and (tmp_path / "some.png").is_file()


# ---- the programs


def test_networks(program, tmp_path):
    told, rows = run(
        program("networks"), tmp_path / "out", "--only", "dcgan", "--rounds", "1", "--batch", "2", "--rank", "1", "4"
    )
    assert [row["rank"] for row in rows] == [1] * 4 + [4] * 4 and all(row["batch"] == 2 for row in rows)
    variants = by_variant(rows[:4], "dcgan")
    assert list(variants) == ["frozen", "full", "lora", "materialised"]
    assert variants["full"]["of_frozen_by_count"] == 1.5, "three products instead of two"
    assert 1 < variants["lora"]["of_frozen_by_count"] < 1.1
    assert variants["materialised"]["of_frozen_by_count"] > 1.5
    assert variants["frozen"]["of_frozen"] == 1 and variants["frozen"]["trainables"] == 0
    assert all(row["ms"] > 0 and len(row["seconds"]) == 1 for row in rows)


def test_peers(program, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("lycoris")
    told, rows = run(program("peers"), tmp_path / "out", "--only", "16ch-8", "dcgan", "--rounds", "1", "--batch", "2")
    assert told["peft"] and told["lycoris-lora"]
    plain = by_variant(rows, "16ch-8")
    learnt = {plain[name]["trainables"] for name in ("lora", "peft", "locon")}
    assert learnt == {4 * (16 + 144)}, "the three train the same factors"
    assert plain["full"]["by_count"] == 1.5 and plain["peft"]["by_count"] < 1.2 < 2.4 < plain["locon"]["by_count"]
    transposed = by_variant(rows, "dcgan")
    assert "ConvTranspose2d" in transposed["peft"]["refused"] and "0 of 5" in transposed["locon"]["refused"]
    assert transposed["lora"]["of_frozen"] > 0 and transposed["lora"]["of_peft"] is None


def test_peers_compute_the_same_as_convlora(program):
    """A LoRA is a LoRA: with the same factors, the same function. So their steps can be compared."""
    peft, _ = pytest.importorskip("peft"), program("_cases")
    peers, cases = program("_peers"), program("_cases")
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).double()
    theirs = peers.peft(network, 2).double()
    ours = cases.lora(network, 2)
    from convlora import Adapter

    scale = {name: change.scale for name, change in Adapter.of(ours).layers.items()}
    with torch.no_grad():
        for name, change in Adapter.of(ours).layers.items():
            layer = theirs.get_submodule(f"base_model.model.{name}")
            change.A.copy_(layer.lora_A["default"].weight.flatten(1) / scale[name])
            change.B.copy_(layer.lora_B["default"].weight.flatten(1))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert (theirs(x) - network(x)).abs().max() > 1e-3 and peft.__version__
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)


def test_anchors(program, person, tmp_path):
    options = [*person, "--batch", "1", "3", "--photos", "3", "--steps", "2", "--rounds", "1"]
    told, rows = run(program("anchors"), tmp_path / "out", *options)
    assert [row["batch"] for row in rows] == [1, 3] and all(row["photos"] == 3 for row in rows)
    assert all(row["by_count"] == pytest.approx(1, rel=1e-3) for row in rows), "arithmetic gains nothing in a batch"
    assert rows[1]["by_bytes"] > 1, "bytes do"
    assert all(len(row["losses"]) == 3 and row["loss"] > 0 for row in rows)
    assert rows[0]["differs"] == 0 and rows[1]["differs"] < 0.1 and told["two_seeds_differ"] < 0.1
    assert rows[0]["photos_per_minute"] < rows[0]["photos_per_minute_at_best"]


def test_person(program, person, tmp_path):
    options = [*person, "--photos", "2", "3", "--anchor-steps", "2", "--steps", "2", "--batch", "2"]
    _, rows = run(program("person"), tmp_path / "out", *options)
    assert [row["photos"] for row in rows] == [2] * 5 + [3] * 5
    stages = {row["stage"]: row for row in rows[:5]}
    assert list(stages) == ["photos", "anchors", "personalisation", "saving", "whole"]
    assert stages["whole"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows[:4]))
    assert sum(row["share"] for row in rows[:4]) == pytest.approx(1)
    assert all(stages[name]["of_floor"] > 1 for name in ("anchors", "personalisation"))


def test_prefix(program, person, tmp_path):
    _, rows = run(program("prefix"), tmp_path / "out", *person, "--batch", "2", "--rounds", "1")
    full, fine, sr = rows
    assert [row["mask"] for row in rows] == ["full", "fine+sr", "sr"]
    assert full["kept_blocks"] == full["kept_bytes"] == 0 and full["by_count"] == full["by_bytes"] == 1
    assert 0 < fine["kept_blocks"] <= sr["kept_blocks"] and fine["kept_bytes"] > 0
    assert sr["by_count"] <= fine["by_count"] < 1 and sr["trainables"] <= fine["trainables"] < full["trainables"]


def test_handling(program, tmp_path):
    handle = program("handle")
    G = tiny_generator()
    subject = handle.Subject(G, 1, tmp_path)
    rows = {row["action"]: row for row in handle.handled(subject, 1, "cpu")}
    assert {"merge", "unmerge", "swap, tensors", "swap, file", "save", "load"} <= set(rows)
    assert rows["save"]["bytes"] > (tmp_path / "one.safetensors").stat().st_size and "of_floor" not in rows["unmerge"]
    found = handle.compiled_swaps(subject, "eager", 2, "cpu")
    assert found["recompiled"] == 0 and found["graphs"] > 0 and (found["graphs"] == 1) == (not found["breaks"])


@pytest.mark.slow
def test_handle(program, tmp_path):
    _, rows = run(program("handle"), tmp_path / "out", "--config", "lab", "--rounds", "1")
    imports = {row["action"]: row for row in rows if row["action"].startswith("import")}
    assert imports["import torch"]["of_floor"] == 1 and imports["import convlora"]["ms"] > 0


def test_memory_of_a_step(program):
    """In this process, where what ran before does not count; the program gives each a process of its own."""
    memory = program("memory")
    rows = [memory.measure("128ch-64", variant, 1, 1, "cpu") for variant in ("frozen", "full")]
    memory.table(rows)
    x = 128 * 64 * 64 * 4
    assert [row["saved"] for row in rows] == [3 * x] * 2, "the input of each layer but the first, which is given"
    assert [row["gradients"] for row in rows] == [0, 4 * 4 * (128 * 128 * 9 + 128)]
    assert all(row["bytes"] > row["floor"] >= 3 * x and row["of_frozen"] >= 1 for row in rows)
    assert memory.measure("dcgan", "peft", 1, 1, "cpu")["refused"]


@pytest.mark.slow
def test_memory(program, tmp_path):
    _, rows = run(program("memory"), tmp_path / "out", "--only", "16ch-8", "dcgan")
    assert len(rows) == 12 and all(row["bytes"] > 0 for row in rows if "refused" not in row)


def test_memory_passes_on_what_went_wrong(program):
    memory = program("memory")
    options = program("_common").arguments("", 1).parse_args(["--device", "nowhere"])
    with pytest.raises(SystemExit, match="nowhere"):
        memory.elsewhere(options, "16ch-8", "frozen", "1", "1")


def test_the_programs_say_what_their_floor_is(program):
    for path in sorted(FOLDER.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        assert f"python benchmarks/{path.name}" in text and "def main(" in text, path.name
        if "import _common" in text:
            assert "\nFloor. " in text, path.name
