"""What a user installs: the built wheel and sdist, looked at, and imported from another folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest depends on tomli there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "_build", "build", "dist", "out", "runs", "*.tmp"
)
pytestmark = pytest.mark.timeout(600)  # building shares two cores with whatever else runs


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def installed_path(file: Path) -> str:
    """Where a file of the repository lands in an installation, as a path relative to site-packages."""
    inside = file.relative_to(ROOT).as_posix()
    return f"convlora/{inside}" if inside.startswith("integrations/") else inside


def shipped_files() -> dict[str, Path]:
    """{path in an installation: path here} of everything in the packages, sources and data."""
    hidden = ("__pycache__", ".")
    return {
        installed_path(file): file
        for top in ("convlora", "integrations")
        for folder, folders, names in os.walk(ROOT / top, followlinks=False)
        for file in (Path(folder, name) for name in names)
        if not any(part.startswith(hidden) for part in file.relative_to(ROOT).parts)
        and file.suffix not in (".pyc", ".tmp")
        and file != ROOT / "convlora" / "integrations"  # the link, as a checkout without links has it
    }


def is_data(path: str) -> bool:
    return not path.endswith((".py", "py.typed"))


@pytest.fixture(scope="module")
def dists(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build (wheel, sdist) as a release would, the wheel from the sdist; in a copy, to leave nothing here."""
    tmp = tmp_path_factory.mktemp("dists")
    shutil.copytree(ROOT, tmp / "source", symlinks=True, ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", cwd=tmp / "source")
    (wheel,) = (tmp / "dist").glob("*.whl")
    (sdist,) = (tmp / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def site(dists: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it."""
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", target]
    run(sys.executable, "-m", "pip", "install", *options, dists[0], cwd=target)
    return target


def test_integrations_is_a_relative_link() -> None:
    link = ROOT / "convlora" / "integrations"
    if not link.is_symlink():
        pytest.skip("a checkout without symbolic links; the wheel does not depend on it")
    assert os.readlink(link).replace("\\", "/") == "../integrations"


def test_every_package_is_listed() -> None:
    tree = {str(PurePosixPath(path).parent) for path in shipped_files() if path.endswith("__init__.py")}
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(path.replace("/", ".") for path in tree)


def test_every_source_is_in_a_package() -> None:
    files = shipped_files()
    stray = [
        path for path in files if path.endswith(".py") and str(PurePosixPath(path).parent / "__init__.py") not in files
    ]
    assert not stray, f"no __init__.py beside {stray}: not installed"


def test_wheel_holds_every_file_exactly_once(dists: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(dists[0]) as wheel:
        names = [n for n in wheel.namelist() if ".dist-info/" not in n]
        digests = Counter(hashlib.sha256(wheel.read(n)).hexdigest() for n in names if is_data(n))
    files = shipped_files()
    assert sorted(names) == sorted(files)
    for path, file in files.items():
        if is_data(path):
            assert digests[hashlib.sha256(file.read_bytes()).hexdigest()] == 1, path


def test_sdist_holds_the_same_files_once(dists: tuple[Path, Path]) -> None:
    with tarfile.open(dists[1]) as sdist:
        members = sdist.getmembers()
    inside = [str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in members if m.isfile()]
    packed = [name for name in inside if name.startswith(("convlora/", "integrations/"))]
    assert not any(m.issym() or m.islnk() for m in members)
    assert sorted(packed) == sorted(file.relative_to(ROOT).as_posix() for file in shipped_files().values())
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(inside)


def test_installed_wheel_imports_in_another_folder(site: Path, tmp_path: Path) -> None:
    code = "\n".join(
        [
            "import importlib.metadata, convlora, convlora.integrations.eg3d as eg3d",
            "from convlora._version import __version__",
            "import convlora.integrations.stylegan2",
            "assert importlib.metadata.version('convlora') == __version__",
            "print(convlora.__file__, eg3d.__file__, sep='\\n')",
        ]
    )
    # The folder comes before an editable installation of this repository, which Python looks up last.
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    convlora_file, eg3d_file = map(Path, out.split("\n")[:2])
    assert convlora_file == site / "convlora" / "__init__.py"
    assert eg3d_file == site / "convlora" / "integrations" / "eg3d" / "__init__.py"


def test_installed_wheel_brings_its_data(site: Path) -> None:
    data = {path: file for path, file in shipped_files().items() if is_data(path)}
    assert any(path.endswith(".safetensors") for path in data), "the tree holds no bundled weights"
    for path, file in data.items():
        assert (site / path).read_bytes() == file.read_bytes(), path


def test_the_program_is_declared_and_names_a_function(site: Path, tmp_path: Path) -> None:
    module, function = project()["project"]["scripts"]["convlora"].split(":")
    code = f"import importlib; print(callable(getattr(importlib.import_module({module!r}), {function!r})))"
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    assert out.split() == ["True"]


def test_wheel_metadata(dists: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(dists[0]) as wheel:
        (metadata,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        lines = wheel.read(metadata).decode("utf-8").splitlines()
        assert any(n.endswith("/LICENSE") for n in wheel.namelist())
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: >=3.10" in lines
    required = [ln for ln in lines if ln.startswith("Requires-Dist") and "extra ==" not in ln]
    assert len(required) == 5, required  # torch, numpy, safetensors, huggingface-hub, tqdm: nothing creeps in
