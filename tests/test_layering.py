"""Who may import whom. Read from the source, so imports inside functions count as well."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Parts of the core that may know only these other parts: a method is mathematics on a matrix, a layer kind
# is a view of a weight as that matrix, and neither knows of the other, of models or of files. A factored weight's
# convolution is mathematics too.
MAY_IMPORT = {
    "errors": set(),
    "methods": {"errors", "methods"},
    "layers": {"errors", "factored"},
    "factored": {"errors", "geometry", "per_sample"},
    "per_sample": {"errors", "geometry"},
    "geometry": set(),
}


def imports(source: str, package: str) -> Iterator[str]:
    """Yield the full name of every module that `source`, a module inside `package`, imports anywhere.

    `from convlora import x` counts as `convlora.x`. A string that is the name of an integration counts too,
    since it is what `importlib.import_module` takes.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base == "convlora" else [base])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"convlora\.integrations[\w.]*", node.value):
                yield node.value


def modules(folder: Path, package: str) -> Iterator[tuple[Path, str]]:
    """Yield (file, the package it is in) for all sources below `folder`, without following the link."""
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder).parent
        if "integrations" not in inside.parts:  # whether rglob follows links depends on Python's version
            yield file, ".".join([package, *inside.parts])


CORE = [case for case in modules(ROOT / "convlora", "convlora") if not case[0].name.startswith("cli")]
STYLEGAN2 = list(modules(ROOT / "integrations" / "stylegan2", "convlora.integrations.stylegan2"))
RESTRICTED = [
    (file, package, part)
    for file, package in CORE
    for part in MAY_IMPORT
    if file == ROOT / "convlora" / f"{part}.py" or package.split(".")[1:2] == [part]
]


def name(value: object) -> str | None:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else None


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import re, convlora.integrations.eg3d as e", "convlora", ["re", "convlora.integrations.eg3d"]),
        ("def f():\n    from .integrations import eg3d", "convlora", ["convlora.integrations"]),
        ("from . import integrations", "convlora", ["convlora.integrations"]),
        ("from .. import attach", "convlora.methods", ["convlora.attach"]),
        ("from ..files import save", "convlora.methods", ["convlora.files"]),
        ("from .change import Change", "convlora.methods", ["convlora.methods.change"]),
        ("load('convlora.integrations.eg3d')", "convlora", ["convlora.integrations.eg3d"]),
        ('"""See convlora.integrations.eg3d."""', "convlora", []),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, package: str, found: list[str]) -> None:
    assert list(imports(source, package)) == found


def test_there_is_something_to_read() -> None:
    assert {part for *_, part in RESTRICTED} == set(MAY_IMPORT)
    assert len(CORE) > len(RESTRICTED)
    assert STYLEGAN2


@pytest.mark.parametrize(("file", "package"), CORE, ids=name)
def test_core_never_imports_an_integration(file: Path, package: str) -> None:
    # An integration registers its layer kinds with the core; the core is complete without it.
    every = imports(file.read_text("utf-8"), package)
    found = [m for m in every if re.match(r"(convlora\.)?integrations\b", m)]
    assert not found, f"{name(file)} imports {found}; only the command line (convlora/cli*.py) may"


@pytest.mark.parametrize(("file", "package", "part"), RESTRICTED, ids=name)
def test_methods_and_layers_know_nothing_of_each_other(file: Path, package: str, part: str) -> None:
    ours = [m for m in imports(file.read_text("utf-8"), package) if m.split(".")[0] == "convlora"]
    found = [m for m in ours if m == "convlora" or m.split(".")[1] not in MAY_IMPORT[part]]
    assert not found, f"{name(file)} imports {found}; {part} may import {sorted(MAY_IMPORT[part])}"


@pytest.mark.parametrize(("file", "package"), STYLEGAN2, ids=name)
def test_stylegan2_does_not_need_eg3d(file: Path, package: str) -> None:
    every = imports(file.read_text("utf-8"), package)
    found = [m for m in every if m.startswith("convlora.integrations.eg3d")]
    assert not found, f"{name(file)} imports {found}"


def test_importing_convlora_needs_the_core_dependencies_only() -> None:
    optional = {"PIL", "numba", "skimage", "matplotlib", "av", "cv2", "scipy", "convlora.integrations"}
    code = f"import sys, convlora; print(*sorted({optional!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
