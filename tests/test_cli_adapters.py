"""The command line's verbs for adapters: what they print and write, with --json and without, and how they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_generator
from torch import nn

import convlora
from convlora import cli, cli_eg3d, files
from convlora.integrations import stylegan2
from convlora.integrations.eg3d import checkpoint

CODE = """
import torch
from torch import nn

def generator():
    print("building")  # must not get into the JSON
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))

class factory:
    @staticmethod
    def build():
        return generator()

def number():
    return 3

def broken():
    raise OSError("no such disk")

shape = (1, 2)
"""
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()


@pytest.fixture(autouse=True)
def studio(tmp_path, monkeypatch):
    """A current folder with a module that makes a model, and an adapter of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studio_for_tests.py").write_text(CODE)
    sys.modules.pop("studio_for_tests", None)
    yield
    sys.modules.pop("studio_for_tests", None)


MODEL = "studio_for_tests:generator"


@pytest.fixture
def saved(randomize) -> str:
    adapter = convlora.inject_lora(make(), rank=2)
    randomize(adapter)
    adapter.save("me.safetensors")
    return "me.safetensors"


@pytest.fixture
def run(capsys):
    """Run a verb with --json and return its object; the exit status must be 0."""

    def run(*arguments: object) -> dict:
        status = cli.main([*map(str, arguments), "--json"])
        printed = capsys.readouterr()
        assert status == 0, printed
        assert len(printed.out.splitlines()) == 1
        return json.loads(printed.out)

    return run


def refused(capsys, *arguments: object) -> str:
    """The error of a verb, which must be the same with --json and without, with nothing else on standard output."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert cli.main([*map(str, arguments)]) == 2
    plain = capsys.readouterr()
    assert cli.main([*map(str, arguments), "--json"]) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)
    assert list(error) == ["error"] and not plain.out.replace("building\n", "")
    assert plain.err.strip().endswith(f"convlora: {error['error']}") and "Traceback" not in plain.err
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert after == before, "nothing was written"
    return error["error"]


def test_info_lists_what_can_be_adapted(run, capsys):
    found = run("info", MODEL)
    model = make()
    assert found["values"] == sum(p.numel() for p in model.parameters()) and found["model"] == "Sequential"
    assert [layer["name"] for layer in found["layers"]] == ["0", "2"]
    assert found["layers"][0]["matrix"] == [8, 36] and found["layers"][0]["max_rank"] == 8
    assert found["rank_1_values"] == convlora.inject_lora(model).num_parameters == 8 + 36 + 3 + 8
    assert cli.main(["info", MODEL, "--targets", "0"]) == 0
    shown = capsys.readouterr().out
    assert "0: Conv2d [8, 4, 3, 3], rank up to 8" in shown and "\n  2:" not in shown
    assert [layer["name"] for layer in run("info", MODEL, "--exclude", "0")["layers"]] == ["2"]


def test_info_knows_the_lab_and_generators_on_disk(run):
    assert run("info", "lab")["model"] == "TriPlaneGenerator"
    checkpoint.save_generator(tiny_generator(), "eg3d.safetensors")
    assert run("info", "eg3d.safetensors")["fingerprint"] == convlora.fingerprint.fingerprint(tiny_generator())
    G = stylegan2.Generator(8, 0, 8, 16, 3, mapping_kwargs={"num_layers": 2}, channel_base=128, channel_max=8)
    stylegan2.checkpoint.save_generator(G, "sg2.safetensors")
    assert run("info", "sg2.safetensors")["model"] == "Generator"


def test_a_model_is_a_function_with_weights_if_wanted(run):
    other = make()
    with torch.no_grad():
        other[0].weight.mul_(2)
    save_file(other.state_dict(), "other.safetensors")
    plain, tuned = run("info", MODEL), run("info", f"{MODEL}@other.safetensors")
    assert plain["fingerprint"] != tuned["fingerprint"] == convlora.fingerprint.fingerprint(other)
    assert run("info", "studio_for_tests:factory.build") == plain


def test_inspect_says_what_a_file_holds(run, saved, capsys):
    found = run("inspect", saved)
    assert found["method"] == "lora" and found["bytes"] == Path(saved).stat().st_size
    assert found["layers"]["0"] == {"rank": 2, "inner": 2, "tensors": {"A": [2, 36], "B": [8, 2], "scale": []}}
    assert found["dtypes"] == ["float32"] and found["metadata"]["library_version"] == convlora.__version__
    assert cli.main(["inspect", saved]) == 0
    assert "0: rank 2 {'A': [2, 36], 'B': [8, 2], 'scale': []}" in capsys.readouterr().out


def test_merge_writes_a_model_that_computes_like_the_adapted_one(run, saved):
    net = make()
    convlora.load_adapter(net, saved)
    written = run("merge", MODEL, saved, "merged.safetensors")
    assert written["layers"] == 2 and written["bytes"] == Path("merged.safetensors").stat().st_size
    plain = make()
    plain.load_state_dict(load_file("merged.safetensors"))
    torch.testing.assert_close(plain(X), net(X), rtol=1e-5, atol=1e-6)
    again = run("info", f"{MODEL}@merged.safetensors")
    assert again["fingerprint"] != run("info", MODEL)["fingerprint"]

    run("merge", MODEL, saved, "half.safetensors", "--strength", "0.5", "--dtype", "float16")
    convlora.Adapter.of(net).set_strength(0.5)
    half = {key: value.float() for key, value in load_file("half.safetensors").items()}
    torch.testing.assert_close(half["0.weight"], net[0].weight, rtol=1e-2, atol=1e-2)
    assert load_file("half.safetensors")["0.weight"].dtype == torch.float16


def test_a_merged_generator_loads_as_one_and_keeps_what_its_file_said(run, randomize):
    G = tiny_generator()
    checkpoint.save_generator(G, "base.safetensors", {"license": "mine"})
    adapter = convlora.inject_lora(G, targets="backbone.synthesis.*")
    randomize(adapter, 0.05)
    adapter.save("person.safetensors", person="lab person A", consent="procedural")
    run("merge", "base.safetensors", "person.safetensors", "merged.safetensors")
    merged = checkpoint.load_generator("merged.safetensors")
    z = torch.randn(1, G.z_dim)
    c = convlora.integrations.eg3d.cameras.frontal(1)
    draw = dict(noise_mode="const", deterministic=True)
    expected = G.synthesis(G.mapping(z, c), c, **draw)["image"]
    torch.testing.assert_close(
        merged.synthesis(merged.mapping(z, c), c, **draw)["image"], expected, rtol=1e-3, atol=1e-3
    )
    with safe_open("merged.safetensors", "pt") as file:
        told = file.metadata()
    assert told["license"] == "mine" and told["merged_adapter"] == "person.safetensors"
    assert told["person"] == "lab person A" and told["consent"] == "procedural"


@pytest.mark.parametrize("format", ["peft", "kohya", "diffusers"])
def test_convert_goes_to_other_libraries_and_back(format, run, saved):
    out = "theirs" if format == "peft" else "theirs.safetensors"
    there = run("convert", saved, out, "--to", format, "--model", MODEL)
    assert (there["from"], there["to"], there["layers"]) == ("convlora", format, 2)
    assert convlora.convert.sniff(out) == format
    back = run("convert", out, "back.safetensors", "--to", "convlora", "--model", MODEL)
    assert back["from"] == format
    one, two = make(), make()
    convlora.load_adapter(one, saved), convlora.load_adapter(two, "back.safetensors")
    torch.testing.assert_close(two(X), one(X), rtol=1e-5, atol=1e-6)


def test_convert_asks_for_what_loralibs_files_do_not_hold(run, capsys):
    save_file({"0.lora_A": torch.randn(3, 12), "0.lora_B": torch.randn(24, 3)}, "old.safetensors")
    assert "pass --alpha" in refused(
        capsys, "convert", "old.safetensors", "new.safetensors", "--to", "convlora", "--model", MODEL
    )
    command = ["convert", "old.safetensors", "new.safetensors", "--to", "convlora", "--model", MODEL]
    assert run(*command, "--alpha", 1)["from"] == "loralib"
    net = make()
    adapter = convlora.load_adapter(net, "new.safetensors")
    old = load_file("old.safetensors")
    torch.testing.assert_close(adapter.delta("0"), (old["0.lora_B"] @ old["0.lora_A"]).view(8, 4, 3, 3))


def test_convert_to_convlora_casts(run, saved):
    run("convert", saved, "half.safetensors", "--to", "convlora", "--model", MODEL, "--dtype", "float16")
    assert run("inspect", "half.safetensors")["dtypes"] == ["float16"]


def test_compare_measures_both_adapters(run, saved, randomize, capsys):
    other = convlora.inject_lora(make(), rank=1, targets="0")
    randomize(other)
    other.save("other.safetensors")
    found = run("compare", saved, "other.safetensors", "--model", MODEL, "--signs")
    one, two = convlora.load_adapter(make(), saved), convlora.load_adapter(make(), "other.safetensors")
    a, b = one.delta("0").detach().flatten(), two.delta("0").detach().flatten()
    (layer,) = found["conflict"]["layers"]
    assert layer["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-5)
    assert layer["sign_disagreement"] == pytest.approx(float((a * b < 0).float().mean()), abs=1e-6)
    assert found["conflict"]["only_a"] == ["2"] and set(found["weight_change"]) == {"a", "b"}
    assert cli.main(["compare", saved, saved, "--model", MODEL, "--by", "block"]) == 0
    assert "1.000" in capsys.readouterr().out, "an adapter agrees with itself"


@pytest.mark.parametrize("how", [["--rank", 2], ["--energy", 1.0], ["--bytes", 3000]])
def test_extract_finds_the_adapter_between_two_checkpoints(how, run, saved):
    run("merge", MODEL, saved, "tuned.safetensors")
    found = run("extract", f"{MODEL}@tuned.safetensors", MODEL, "found.safetensors", *how)
    assert found["bytes"] == Path("found.safetensors").stat().st_size <= 3000
    assert found["ranks"] == {"0": 2, "2": 2} and found["extracted"]["total"] < 1e-4
    net, tuned = make(), make()
    tuned.load_state_dict(load_file("tuned.safetensors"))
    convlora.load_adapter(net, "found.safetensors")
    torch.testing.assert_close(net(X), tuned(X), rtol=1e-4, atol=1e-4)


def test_extract_says_what_else_changed(run, capsys):
    tuned = make()
    with torch.no_grad():
        tuned[0].weight.add_(0.1), tuned[2].bias.add_(1)
    save_file(tuned.state_dict(), "tuned.safetensors")
    command = ["extract", f"{MODEL}@tuned.safetensors", MODEL, "found.safetensors", "--rank", "1"]
    assert cli.main(command) == 0
    assert "changed, but not in the adapter (see --train): 2.bias" in capsys.readouterr().out
    found = run(*command, "--force", "--train", "2.bias")
    assert not found["extracted"]["left_out"]
    assert "train/2.bias" in load_file("found.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    with HubServer() as server:
        yield server


def test_push_and_pull_give_the_same_adapter(hub, run, saved, capsys):
    pushed = run("push", saved, "me/first", "--model", MODEL, "--endpoint", hub.endpoint, "--message", "from the shell")
    assert pushed["private"] and pushed["url"].startswith(hub.endpoint) and hub.repos["me/first"].private
    pulled = run("pull", "me/first", "back.safetensors", "--endpoint", hub.endpoint)
    assert pulled["method"] == "lora" and files.read(Path("back.safetensors"))[0].keys() == load_file(saved).keys()
    one, two = make(), make()
    convlora.load_adapter(one, saved), convlora.load_adapter(two, "back.safetensors")
    assert torch.equal(one(X), two(X))
    assert "back.safetensors exists" in refused(
        capsys, "pull", "me/first", "back.safetensors", "--endpoint", hub.endpoint
    )
    assert run("pull", "me/first", "back.safetensors", "--endpoint", hub.endpoint, "--force")
    wrong = ["pull", "me/nothing", "other.safetensors", "--endpoint", hub.endpoint]
    assert cli.main(wrong) == 2 and "me/nothing" in capsys.readouterr().err and not Path("other.safetensors").exists()


def test_a_persons_adapter_becomes_public_with_consent_only(hub, run, saved, capsys):
    command = ["push", saved, "me/person", "--model", MODEL, "--endpoint", hub.endpoint, "--public", "--person", "A"]
    assert cli.main(command) == 2
    assert "consent" in capsys.readouterr().err and "me/person" not in hub.repos
    assert not run(*command, "--consent", "A agreed in writing on 1 May.")["private"]


WRONG = {
    "no such model": (["info", "nowhere"], "no model 'nowhere': MODEL is lab"),
    "no such module": (["info", "nowhere:make"], "ModuleNotFoundError: No module named 'nowhere'"),
    "no such function": (["info", "studio_for_tests:nothing"], "has no attribute 'nothing'"),
    "a function that fails": (["info", "studio_for_tests:broken"], "OSError: no such disk"),
    "a function that gives something else": (["info", "studio_for_tests:number"], "gave int, not an nn.Module"),
    "no function": (["info", "studio_for_tests:shape"], "gave tuple, not an nn.Module"),
    "weights of another model": (["info", f"{MODEL}@me.safetensors"], "me.safetensors does not fit"),
    "no weights": (["info", f"{MODEL}@none.safetensors"], "no such file: none.safetensors"),
    "an adapter for a model": (["info", "me.safetensors"], "is an adapter; MODEL is the model"),
    "no such layer": (["info", MODEL, "--targets", "zap*"], "'zap*' matches no adaptable layer"),
    "no adapter": (["merge", MODEL, "none.safetensors", "out.safetensors"], "no such file: none.safetensors"),
    "another base": (["merge", "lab", "me.safetensors", "out.safetensors"], "belongs to another base model"),
    "output that exists": (["merge", MODEL, "me.safetensors", "me.safetensors"], "me.safetensors exists"),
    "output in a folder that exists": (
        ["convert", "me.safetensors", "full", "--to", "peft", "--model", MODEL], "full exists; choose another name"),
    "format of nobody": (["convert", "plain.safetensors", "out", "--to", "peft", "--model", MODEL], "no adapter"),
    "energy above 1": (["extract", MODEL, MODEL, "out.safetensors", "--energy", "7"], "energy"),
    "no difference": (["extract", MODEL, MODEL, "out.safetensors", "--rank", "1"], "differ"),
    "pushing nothing": (["push", "none.safetensors", "me/x", "--model", MODEL], "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_exits_with_2_says_why_and_writes_nothing(case, saved, capsys):
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    save_file({"a": torch.zeros(1)}, "plain.safetensors")
    arguments, message = WRONG[case]
    assert message in refused(capsys, *arguments)


def test_wrong_usage_is_a_json_error_too(capsys):
    assert cli.main(["extract", MODEL, MODEL, "out", "--json"]) == 2
    assert "one of the arguments --rank --energy --bytes is required" in json.loads(capsys.readouterr().out)["error"]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["extract", MODEL, MODEL, "out"])
    assert "usage: convlora extract" in capsys.readouterr().err


def test_an_interrupted_output_leaves_the_old_file(run, saved, monkeypatch, capsys):
    run("merge", MODEL, saved, "out.safetensors")
    content = Path("out.safetensors").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    assert cli.main(["merge", MODEL, saved, "out.safetensors", "--force"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert Path("out.safetensors").read_bytes() == content and not list(Path().glob(".*.tmp"))


def test_the_parser_needs_neither_torch_nor_a_verbs_imports():
    """Importing the package brings torch; the command line itself adds nothing before a verb runs."""
    code = (
        "import sys, types; package = types.ModuleType('convlora'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['convlora'] = package; from convlora import cli\n"
        "try: cli.main(['convert', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    )
    folder = str(Path(convlora.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--to {convlora,peft,kohya,diffusers}" in done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [(["info", "lab"], "nothing was written"), (["eg3d", "demo"], "the same command goes on from here")],
)
def test_ctrl_c_says_what_became_of_the_work(arguments, said, monkeypatch, capsys):
    from convlora import cli, cli_adapters

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_adapters, "_info", interrupted)
    monkeypatch.setattr(cli_eg3d, "_demo", interrupted)
    assert cli.main(arguments) == 130
    assert said in capsys.readouterr().err
