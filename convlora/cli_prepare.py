"""`convlora eg3d prepare`: photos become an album."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convlora.cli_adapters import Output
from convlora.errors import ConvloraError


def add_verb(verbs: Any) -> None:
    """Add `prepare` to the verbs of `convlora eg3d`."""
    parser = verbs.add_parser("prepare", help="an album of one person's photos, aligned and with cameras")
    parser.add_argument("photos", type=Path, help="folder of photos, or one photo; it is only read")
    parser.add_argument("album", type=Path, help="folder to write, new or of the same input")
    parser.add_argument("--person", metavar="NAME", help="who it is (default: the name of the photos' folder)")
    parser.add_argument(
        "--consent", metavar="TEXT", default="not recorded", help="who agreed to what, for the manifest"
    )
    parser.add_argument("--held-out", type=int, default=0, metavar="N", help="photos kept for measuring (default 0)")
    parser.add_argument("--landmarks", type=Path, metavar="FILE", help="your own landmarks, .json or .csv")
    parser.add_argument("--detector", type=Path, metavar="PATH", help="YuNet's .onnx file (default: fetched once)")
    parser.add_argument(
        "--identity", metavar="NAME[:PATH]", help="arcface_ir101 or arcface_ir_se50: find the person among several"
    )
    parser.add_argument("--species", choices=["face", "cat", "lab"], default="face", help="whose face (default face)")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="side of the crops (default 512)")
    parser.add_argument(
        "--padding", choices=["mirror", "edge", "black"], default="mirror", help="beyond the photo (default mirror)"
    )
    parser.add_argument("--keep-all", action="store_true", help="keep blurred, small, cropped … photos, with warnings")
    parser.add_argument("--aligned", action="store_true", help="the folder has EG3D's dataset.json: check and copy it")
    parser.add_argument("--device", default="cpu", help="where --identity computes (default cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> Output:
    from convlora.integrations.eg3d.prepare import LandmarkDetector, LandmarkFile, YuNet, copy_aligned, prepare

    album = {"held_out": options.held_out, "person": options.person, "consent": options.consent}
    if options.aligned:
        _refuse_with_aligned(options)
        done = copy_aligned(options.photos, options.album, **album)
    else:
        if options.landmarks and options.detector:
            raise ConvloraError("--landmarks and --detector: give one of them")
        detector: LandmarkDetector | None = None
        if options.landmarks:
            detector = LandmarkFile(options.landmarks)
        elif options.detector:
            detector = YuNet(options.detector)
        identity = None
        if options.identity:
            from convlora.cli_device import prepare_device
            from convlora.integrations.eg3d.metrics import load_identity

            prepare_device(options.device)
            own = options.identity.partition(":")[0] == "lab"  # its heads are drawn in place
            identity = load_identity(options.identity, device=options.device, align="pool" if own else "5pt")
        done = prepare(
            options.photos, options.album, detector=detector, identity=identity, species=options.species,
            size=options.size, padding=options.padding, keep_all=options.keep_all, progress=not options.quiet, **album,
        )  # fmt: skip
    kept, out = len(done.train) + len(done.test), len(done.rejected)
    lines = [
        f"{kept} of {kept + out} photos are in {done.folder}: {len(done.train)} to train, {len(done.test)} held out"
    ]
    lines += [f"  left out  {source}: {reason}" for source, reason in done.rejected]
    lines += [f"look at   {done.folder / 'contact_sheet.png'}"]
    if options.consent == "not recorded":
        lines += ["consent is not recorded: --consent TEXT puts it into the album, and from there into adapters"]
    data = {
        "album": str(done.folder), "train": done.train, "test": done.test,
        "rejected": [{"source": source, "reason": reason} for source, reason in done.rejected],
    }  # fmt: skip
    return Output("\n".join(lines), data)


def _refuse_with_aligned(options: argparse.Namespace) -> None:
    given = [name for name in ("landmarks", "detector", "identity", "keep_all") if getattr(options, name)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConvloraError(f"{names} with --aligned: aligned photos are copied as they are")
