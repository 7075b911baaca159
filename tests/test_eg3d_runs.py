"""Output folders and the command line: resumed after a kill, refused when in use, clear about wrong input."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_generator, write_tiny_album

from convlora import cli
from convlora.errors import ConvloraError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import pipeline
from convlora.integrations.eg3d.run_folder import RunFolder

SHORT = ["--anchor-steps", "2", "--steps", "12", "--batch-size", "2", "--quiet"]


@pytest.fixture
def files(tmp_path):
    """A generator file, an album beside it, and the command that personalises it."""
    generator = eg3d.save_generator(tiny_generator(), tmp_path / "G.safetensors")
    album = write_tiny_album(tmp_path / "album", 5)
    out = tmp_path / "out"
    command = ["eg3d", "personalize", str(album), "--generator", str(generator), "--out", str(out), "--held-out", "2"]
    return out, [*command, *SHORT]


def test_a_folder_is_new_resumed_or_refused(tmp_path):
    with RunFolder(tmp_path / "run", {"steps": 3}) as folder, folder.timed("stage"):
        with (
            pytest.raises(ConvloraError, match="in use by another running process"),
            RunFolder(tmp_path / "run", {"steps": 3}),
        ):
            pass
    with RunFolder(tmp_path / "run", {"steps": 3}) as folder:
        assert folder.seconds()["stage"] > 0
    with (
        pytest.raises(ConvloraError, match="other settings .steps: 3 there, 4 now"),
        RunFolder(tmp_path / "run", {"steps": 4}),
    ):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ConvloraError, match="holds other files"), RunFolder(tmp_path / "full", {}):
        pass
    with pytest.raises(ConvloraError, match="is a file"), RunFolder(tmp_path / "full" / "thesis.txt", {}):
        pass
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_personalize_writes_an_adapter_and_a_report(files, capsys):
    out, command = files
    assert cli.main([*command, "--compare-full"]) == 0
    printed = capsys.readouterr()
    for word in ("pretrained", "full fine-tuning", "LoRA rank 1", "PSNR", str(out / "report.html")):
        assert word in printed.out
    assert "stand-in" in printed.err, "what the numbers are not is said"
    assert (out / "report.html").read_text().count("data:image/") > 10
    assert json.loads((out / "report.json").read_text())["rows"]
    assert cli.main(["inspect", str(out / "adapter.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "lora adapter" in shown and "consent: not recorded" in shown and "decoder.net.0.weight: in full" in shown


def test_a_killed_run_resumes_to_the_same_adapter(files, tmp_path, monkeypatch, capsys):
    out, command = files
    assert cli.main(command) == 0
    wanted = tensors(out / "adapter.safetensors")
    again = [word.replace(str(out), str(tmp_path / "again")) for word in command]
    real, stage = pipeline.tune, []

    def killed(*args, **kwargs):
        if not stage:
            stage.append("killed")
            real(*args, **{**kwargs, "progress": False})
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "tune", killed)
    assert cli.main(again) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "again" / "adapter.safetensors").exists()
    assert cli.main(again) == 0
    assert all(
        torch.equal(value, wanted[key]) for key, value in tensors(tmp_path / "again" / "adapter.safetensors").items()
    )


def tensors(path):
    from convlora import files as adapter_files

    return adapter_files.read(path)[0]


def test_wrong_input_exits_with_2_and_one_line(files, tmp_path, capsys):
    out, command = files
    wrong = {
        "no album folder": ["eg3d", "personalize", str(tmp_path / "nowhere"), "--out", str(out)],
        "not usable here": [*command, "--device", "cuda:77"],
        "rank 0 is below 1": [*command, "--rank", "0"],
        "no such file": ["inspect", str(tmp_path / "none.safetensors")],
        "1 to 50": ["eg3d", "demo", "--photos", "51", "--out", str(out)],
    }
    for message, arguments in wrong.items():
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error.splitlines()[-1] and "Traceback" not in error
    other = [*command[:-2], "3", "--quiet"]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main(other) == 2
    assert "other settings (batch_size: 2 there, 3 now)" in capsys.readouterr().err


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eg3d", "--help"])
    assert {"demo", "personalize"} <= set(capsys.readouterr().out.split())
