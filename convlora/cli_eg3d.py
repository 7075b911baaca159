"""`convlora eg3d …`: from photos to a personal 3D generator."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from convlora import cli_check, cli_import, cli_instant, cli_page, cli_prepare, cli_study, cli_tasks
from convlora.cli_device import prepare_device

#: Verbs that go on where an interrupted run of the same command stopped.
RESUMING = ("demo", "personalize", "prepare", "study", "page", *cli_tasks.RESUMING, *cli_instant.RESUMING)


def add_verbs(verbs: Any) -> None:
    """Add `eg3d` and its verbs to the program."""
    eg3d = verbs.add_parser("eg3d", help="personal 3D generators").add_subparsers(required=True, metavar="VERB")
    demo = eg3d.add_parser("demo", help="an album of a procedural person becomes a personal 3D generator")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="output folder, new or of the same run")
    demo.add_argument("--photos", type=int, default=16, metavar="N", help="training photos, up to 50 (default 16)")
    demo.add_argument("--held-out", type=int, default=8, metavar="N", help="test photos, up to 12 (default 8)")
    _common(demo)
    demo.set_defaults(run=_demo)

    personalize = eg3d.add_parser("personalize", help="a personal generator from an album of photos")
    personalize.add_argument("album", type=Path, help="folder of photos with EG3D's dataset.json")
    personalize.add_argument("--generator", default="lab", help='"lab", "lab-cats" or a generator\'s .safetensors')
    personalize.add_argument("--out", type=Path, required=True, help="output folder, new or of the same run")
    personalize.add_argument("--held-out", type=int, default=0, metavar="N", help="photos kept for measuring")
    personalize.add_argument("--compare-full", action="store_true", help="tune the whole generator too, to compare")
    personalize.add_argument(
        "--perceptual", metavar="NAME[:PATH]",
        help="lpips_alex, lpips_vgg, lpips_squeeze, dists, lab or none (default: lpips_alex, for the lab its own)",
    )  # fmt: skip
    personalize.add_argument(
        "--identity", metavar="NAME[:PATH]", help="arcface_ir101, arcface_ir_se50, lab or none, to measure ID_sim"
    )
    personalize.add_argument(
        "--refine-camera", choices=["rotation", "full", "off"],
        help="correct the cameras together with the latents (default: full where they come from landmarks)",
    )  # fmt: skip
    _common(personalize)
    personalize.set_defaults(run=_personalize)
    cli_import.add_eg3d_verb(eg3d)
    cli_prepare.add_verb(eg3d)
    cli_check.add_verb(eg3d)
    cli_tasks.add_task_verbs(eg3d)
    cli_study.add_verb(eg3d)
    cli_page.add_verb(eg3d)
    cli_instant.add_verbs(eg3d)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="rank of every ΔW (default 1)")
    parser.add_argument("--preset", choices=["true_rank", "paper", "official_code"], help="which tensors train")
    parser.add_argument("--anchor-steps", type=int, metavar="N", help="optimisation steps of each inversion")
    parser.add_argument("--steps", type=int, metavar="N", help="optimisation steps of the personalisation")
    parser.add_argument("--batch-size", type=int, metavar="N", help="photos per step")
    parser.add_argument("--accumulate", type=int, metavar="N", help="parts of a step, one in memory at a time")
    parser.add_argument(
        "--checkpointing", action="store_true", default=None, help="less memory for one more forward per step"
    )
    parser.add_argument(
        "--precision", choices=["float32", "tf32", "bfloat16"], help="of the personalisation (default: torch's own)"
    )
    parser.add_argument(
        "--patience", type=int, metavar="N",
        help="watch every eighth training photo; stop after N looks, 50 steps apart, without a loss lower by 0.5 %%",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of every random draw (default 0)")
    parser.add_argument("--device", default="cpu", help='where to compute, e.g. "cuda" (default cpu)')
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _demo(options: argparse.Namespace) -> None:
    prepare_device(options.device)
    from convlora.integrations.eg3d.demo import LAB_SETTINGS, run_demo

    command = shlex.join(["convlora", *sys.argv[1:]])
    report = run_demo(
        options.out, train=options.photos, test=options.held_out, settings=_settings(LAB_SETTINGS, options),
        device=options.device, command=command, progress=not options.quiet,
    )  # fmt: skip
    _finish(report, options.out)


def _personalize(options: argparse.Namespace) -> None:
    prepare_device(options.device)
    from dataclasses import replace

    from convlora.integrations.eg3d.album import load_album
    from convlora.integrations.eg3d.checkpoint import SHIPPED, load_generator
    from convlora.integrations.eg3d.demo import LAB_SETTINGS, lab_directions
    from convlora.integrations.eg3d.metrics import described
    from convlora.integrations.eg3d.networks import choose_networks
    from convlora.integrations.eg3d.pipeline import Settings, check_settings, personalize_album
    from convlora.integrations.eg3d.report import Plan
    from convlora.integrations.eg3d.run_folder import RunFolder

    drawn = options.generator in SHIPPED
    G = load_generator(options.generator, options.device)
    album = load_album(options.album, G.img_resolution, options.held_out)
    settings = _settings(LAB_SETTINGS if drawn else Settings(), options, compare_full=options.compare_full)
    settings = replace(settings, refine_camera=options.refine_camera)
    check_settings(G, settings)
    networks, told = choose_networks(options.generator, options.perceptual, options.identity, options.device)
    for line in told:
        print(f"convlora: {line}", file=sys.stderr)
    record = {"album": str(options.album.resolve()), "generator": options.generator, **vars(settings)}
    if not drawn or options.perceptual:
        record["perceptual"] = described(networks.perceptual)
    with RunFolder(options.out, {**record, "photos": album.train.names, "held_out": album.test.names}) as out:
        command = shlex.join(["convlora", *sys.argv[1:]])
        shown: dict[str, Any] = {}
        if drawn:
            shown["plan"] = Plan(yaw=settings.yaw)
        if options.generator == "lab":
            shown["directions"] = lambda hull: lab_directions(G, hull)
        report = personalize_album(
            G, album, out, settings, networks, **shown, command=command, progress=not options.quiet
        )
    _finish(report, options.out)


def _settings(defaults: Any, options: argparse.Namespace, **more: Any) -> Any:
    from dataclasses import replace

    from convlora.integrations.eg3d.pipeline import TUNE_OPTIONS

    names = ("rank", "preset", "anchor_steps", "steps", "batch_size", "seed", *TUNE_OPTIONS)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(defaults, **given, **more)


def _finish(report: Any, out: Path) -> None:
    from convlora.integrations.eg3d.report import moved_cameras, table, write_results

    page, *others = write_results(report, out)
    print(f"\n{report.notice}\n\n{table(report.rows, report.metric_notes)}\n")
    for photos, by in moved_cameras(report).items():
        print(f"cameras  of {photos} turned by {by}")
    print(f"adapter  {out / 'adapter.safetensors'}  ({(out / 'adapter.safetensors').stat().st_size:,} bytes)")
    print(f"report   {page}  (also {', '.join(path.name for path in others)})")
