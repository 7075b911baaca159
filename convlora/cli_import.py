"""`convlora eg3d import` and `convlora stylegan2 import`: a generator of any known form becomes a safetensors file."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from convlora.cli_adapters import Output, _verb
from convlora.errors import FileError

_SOURCE = ".pkl (read without running it), .safetensors, .pt, folder, https://…, hf://user/repository/file or user/name"
MODEL, CONFIG = "model.safetensors", "config.json"


def add_eg3d_verb(verbs: Any) -> None:
    """Add `import` to the verbs of `eg3d`."""
    _add(verbs, _eg3d, "an EG3D generator of any known form becomes a safetensors file")


def add_stylegan2(verbs: Any) -> None:
    """Add `stylegan2` with its verb `import` to the program."""
    stylegan2 = verbs.add_parser("stylegan2", help="StyleGAN2 generators").add_subparsers(required=True, metavar="VERB")
    _add(stylegan2, _stylegan2, "a StyleGAN2 generator of any known form becomes a safetensors file")


def _add(verbs: Any, run: Any, summary: str) -> None:
    parser = _verb(verbs, "import", run, summary)
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("out", type=Path, metavar="OUT", help=f"new folder for {MODEL} and {CONFIG}")
    parser.add_argument("--preset", metavar="NAME", help="configuration of a file that carries none")


def _eg3d(options: argparse.Namespace) -> Output:
    from convlora.integrations.eg3d import checkpoint

    return _import(options, checkpoint)


def _stylegan2(options: argparse.Namespace) -> Output:
    from convlora.integrations.stylegan2 import checkpoint

    return _import(options, checkpoint)


def _import(options: argparse.Namespace, family: Any) -> Output:
    from convlora.integrations.stylegan2.sources import read_source
    from convlora.integrations.weights import digest

    found = read_source(options.source)
    G = family.generator_of(found, options.preset)
    metadata = {
        **{key: value for key, value in found.metadata.items() if key not in ("config", "format")},
        "source": found.path.name,
        "source_sha256": digest(found.path),
        "class_name": found.class_name or type(G).__name__,
        "license": found.licence,
    }
    if options.preset:
        metadata["preset"] = options.preset
    config = G.config
    there = _write(G, options.out, config, metadata, family)
    data = _described(G, config, metadata) | {"file": str(options.out / MODEL), "was_there": there}
    lines = [f"{options.out / MODEL}: " + ("the same import lies here already" if there else "written")]
    lines += [f"  {name.replace('_', ' ')}: {_text(value)}" for name, value in data.items() if name not in _SILENT]
    return Output("\n".join(lines), data)


_SILENT = ("file", "was_there", "config")


def _text(value: Any) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _described(G: Any, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "class": metadata["class_name"],
        "resolution": G.img_resolution,
        "parameters": sum(parameter.numel() for parameter in G.parameters()),
        "num_ws": G.num_ws,
    }
    rendering = config.get("rendering_kwargs")
    if rendering is not None:
        data["neural_rendering_resolution"] = G.neural_rendering_resolution
        data["super_resolution"] = G.superresolution.name
        data["camera_pivot"] = rendering.get("avg_camera_pivot", "not stated")
        data["camera_radius"] = rendering.get("avg_camera_radius", "not stated")
    return data | {
        "source": metadata["source"],
        "source_sha256": metadata["source_sha256"],
        "licence": metadata["license"],
        "config": config,
    }


def _write(G: Any, out: Path, config: dict[str, Any], metadata: dict[str, str], family: Any) -> bool:
    """Write the folder as a whole, or find that the same import lies there: True."""
    import torch

    from convlora import files

    if out.is_file():
        raise FileError(f"{out} is a file; OUT is a new folder")
    if out.is_dir() and any(out.iterdir()):
        if (out / MODEL).is_file() and (out / CONFIG).is_file():
            _, told = files.read(out / MODEL)
            same = {key: told.get(key) for key in metadata} == metadata
            if same and json.loads(told.get("config", "null")) == json.loads(json.dumps(config)):
                return True
        raise FileError(f"{out} holds something else already: name a new folder for this import")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        family.save_generator(G, folder / MODEL, metadata, torch.float32)
        with files.replacing(folder / CONFIG) as path:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if out.is_dir():  # empty
            out.rmdir()
        os.replace(folder, out)
    return False
