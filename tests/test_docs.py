"""The README, the examples and the docs say what is so: their code runs, and every public name is described."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import convlora
from convlora import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))


def run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_ten_lines_run(tmp_path):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    (tmp_path / "readme.py").write_text(code)
    run(["readme.py"], tmp_path)
    assert (tmp_path / "me.safetensors").stat().st_size < 7000, "the README says 6 kB"


def test_the_gan_example_runs(tmp_path):
    printed = run([str(ROOT / "examples" / "your_own_gan.py")], tmp_path)
    assert "the same images bit for bit" in printed and "the model as it was" in printed


def test_the_eg3d_example_runs(tmp_path):
    printed = run([str(ROOT / "examples" / "eg3d_personalize.py"), "out", "--quick"], tmp_path)
    assert "adapter.safetensors" in printed
    assert {"sheet.png", "orbit.webp", "anchors.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("name", convlora.__all__)
def test_every_public_name_is_documented(name):
    assert re.search(rf"\b{name}\b", PAGES), f"{name} stands in no page of docs/ and not in the README"
    assert getattr(convlora, name).__doc__, name


@pytest.mark.parametrize("method", [m for m in vars(convlora.Adapter) if not m.startswith("_")])
def test_every_method_of_the_handle_has_a_docstring(method):
    described = getattr(convlora.Adapter, method).__doc__
    assert described or method in ("method", "options", "merged", "enabled", "record")


def verbs(parser: argparse.ArgumentParser, above: str = "") -> Iterator[str]:
    """The whole of every command that `parser` knows, such as "eg3d demo"."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield above.strip()
    for action in inner:
        for name, below in action.choices.items():
            yield from verbs(below, f"{above} {name}")


VERBS = list(verbs(cli._parser(argparse.ArgumentParser)))


def test_there_are_verbs():
    assert {"info", "eg3d demo", "eg3d import", "stylegan2 import"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_documented_and_has_help(verb, capsys):
    assert f"convlora {verb}" in PAGES
    with pytest.raises(SystemExit, match="0"):
        cli.main([*verb.split(), "--help"])
    assert "usage: convlora" in capsys.readouterr().out


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
