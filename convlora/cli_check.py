"""`convlora eg3d check`: what is wrong with an album's cameras and pictures, before hours go into it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convlora.cli_adapters import Output
from convlora.cli_device import add_options


def add_verb(verbs: Any) -> None:
    """Add `check` to the verbs of `eg3d`."""
    check = verbs.add_parser("check", help="find mistakes in an album's cameras and pictures")
    check.add_argument("model", metavar="MODEL", help='"lab" or a generator\'s .safetensors')
    check.add_argument("album", type=Path, metavar="ALBUM", help="folder of photos with EG3D's dataset.json")
    check.add_argument("--fast", action="store_true", help="look at labels only, without inverting photos")
    check.add_argument("--photos", type=int, default=6, metavar="N", help="photos to invert (default %(default)s)")
    check.add_argument("--steps", type=int, default=30, metavar="N", help="steps of each inversion (default 30)")
    add_options(check)
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> Output:
    from convlora.cli_device import prepare_device
    from convlora.errors import ConvloraError

    if options.photos < 3 or options.steps < 1:
        raise ConvloraError(f"--photos {options.photos} --steps {options.steps}: at least 3 photos and 1 step, please")
    prepare_device(options.device)
    from convlora.integrations.eg3d.check import Fitting, check_album, table
    from convlora.integrations.eg3d.checkpoint import SHIPPED, load_generator
    from convlora.integrations.eg3d.networks import lab_networks

    G = load_generator(options.model, options.device).requires_grad_(False)
    fitting = Fitting(steps=options.steps)
    if options.model in SHIPPED and not options.fast:
        networks = lab_networks(options.device, options.model)
        fitting = fitting._replace(init=networks.encoder, perceptual=networks.perceptual)
    findings = check_album(
        G, options.album, fast=options.fast, fitting=fitting, photos=options.photos, progress=not options.quiet
    )
    wrong = sum(finding.status == "error" for finding in findings)
    verdict = f"{wrong} mistake{'s' * (wrong != 1)} found" if wrong else "no mistake found"
    data = {"album": str(options.album), "mistakes": wrong, "findings": [finding._asdict() for finding in findings]}
    return Output(f"{table(findings)}\n{verdict}", data, 1 if wrong else 0)
