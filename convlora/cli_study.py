"""`convlora eg3d study`: the paper's tables and figures on the lab's people."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

from convlora.cli_adapters import Output
from convlora.cli_device import add_options
from convlora.errors import ConvloraError

_NUMBERS = ("views", "samples", "pairs", "latent_steps", "tune_steps", "project_steps", "directions")


def add_verb(eg3d: Any) -> None:
    """Add `study` to the verbs of `eg3d`."""
    study = eg3d.add_parser("study", help="a table or figure of My3DGen's paper, on procedural people")
    study.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="T1 … T6, F4, F8, F9, F11, F12, X1 or all (My3DGen), H1, P1 … P3, B1, B2 or companions",
    )
    study.add_argument("--out", type=Path, default=Path("out/studies"), help="folder; models in it are used again")
    study.add_argument("--identities", type=int, metavar="N", help="people (default 9, or all albums)")
    study.add_argument("--seeds", type=int, default=3, metavar="N", help="repetitions of each (default 3)")
    study.add_argument("--photos", type=int, default=50, metavar="N", help="photos to learn from (default 50)")
    study.add_argument("--largest", type=int, default=100, metavar="N", help="photos drawn of each (default 100)")
    study.add_argument("--tests", type=int, default=12, metavar="N", help="held-out photos of each (default 12)")
    study.add_argument("--steps", type=int, metavar="N", help="of personalisation (default: the demo's)")
    study.add_argument("--sizes", default="10,50,100", help="numbers of photos of T6 (default 10,50,100)")
    study.add_argument("--ranks", default="1,4,16", help="of T5 (default 1,4,16)")
    study.add_argument("--enhanced", type=int, metavar="N", help="held-out photos that tasks run on (default 6)")
    study.add_argument("--jobs", type=int, default=1, metavar="N", help="people learnt side by side (default 1)")
    for name in _NUMBERS:
        study.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=argparse.SUPPRESS)
    study.add_argument("--generator", default="lab", help='"lab", "lab-cats" or a generator, with --albums')
    study.add_argument("--albums", type=Path, nargs="+", default=[], metavar="ALBUM", help="of people, one each")
    study.add_argument("--perceptual", metavar="NAME[:PATH]", help="the perceptual distance, as for personalize")
    study.add_argument("--identity", metavar="NAME[:PATH]", help="the identity encoder, as for personalize")
    study.add_argument(
        "--score", metavar="MODULE:FUNCTION", help="(images, labels, attribute) -> (N,), for T4 on photographs"
    )
    study.add_argument(
        "--known",
        type=Path,
        metavar="FOLDER",
        help="results of the same settings to go on from: people in them are not measured again",
    )
    add_options(study)
    study.set_defaults(run=_study)


def _study(options: argparse.Namespace) -> Output:
    from convlora.cli_device import prepare_device

    prepare_device(options.device)
    from dataclasses import replace

    from convlora.integrations.eg3d.demo import LAB_SETTINGS
    from convlora.integrations.eg3d.pipeline import Settings, environment
    from convlora.integrations.eg3d.studies import ALL, COMPANIONS, STUDIES, Cohort, Results
    from convlora.integrations.eg3d.studies.effort import LAB, Effort
    from convlora.integrations.eg3d.studies.instant import HYPERNETWORK
    from convlora.integrations.eg3d.studies.page import DRAWN, PHOTOGRAPHS, write_page
    from convlora.integrations.eg3d.studies.run import run_studies

    drawn = not options.albums
    groups = {"all": STUDIES, "companions": COMPANIONS}
    names = [name for asked in options.names for name in groups.get(asked, [asked])]
    if groups.keys() & set(options.names):  # without those that need what is not there
        people = options.generator == "lab"
        hyper = (people and drawn) or (options.out / HYPERNETWORK).is_file()
        several = options.identities != 1 and len(options.albums) != 1
        possible = {"X1": people and drawn, "T4": people or options.score, "H1": hyper, "P3": several}
        possible |= {"B1": drawn, "B2": drawn}
        names = [name for name in names if name in options.names or possible.get(name, True)]
    given: dict[str, Any] = {name: getattr(options, name) for name in _NUMBERS if getattr(options, name) is not None}
    effort = replace(LAB if drawn else Effort(), sizes=_list(options.sizes), ranks=_list(options.ranks), **given)
    if options.enhanced is not None:
        effort = replace(effort, photos=options.enhanced)
    settings = LAB_SETTINGS if drawn else Settings()
    settings = settings if options.steps is None else replace(settings, steps=options.steps)
    albums = tuple(options.albums[: options.identities])
    cohort = Cohort(
        options.out, options.identities or len(albums) or 9, options.seeds, options.photos, options.largest,
        options.tests, settings, options.device, not options.quiet, options.generator, albums, options.perceptual,
        options.identity, None if options.score is None else _function(options.score), options.known,
    )  # fmt: skip
    command = shlex.join(["convlora", *sys.argv[1:]])
    origin = DRAWN if drawn else PHOTOGRAPHS
    written = []
    results = run_studies(names, cohort, effort, options.jobs)
    for found in results:
        made = {"command": command, "effort": str(effort), "settings": cohort.record}
        found.facts = {"data": origin, **made, **found.facts, **environment(options.device)}
        written += found.write(options.out)
    known = [name for name in ALL if (options.out / f"{name}.json").is_file()]
    page = write_page([Results.read(options.out, name) for name in known], options.out / "studies.html")
    text = "\n\n".join(f"{one.title}\n\n{one.table()}\n\n{one.verdicts()}" for one in results)
    data = {"page": str(page), "files": [str(path) for path in written], "studies": [one.json() for one in results]}
    return Output(f"{text}\n\n{origin}\npage  {page}", data)


def _function(text: str) -> Any:
    """The object that MODULE:FUNCTION names; the module may lie in the current folder."""
    module, _, name = text.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConvloraError(f"--score {text}: {error}; it is MODULE:FUNCTION of an importable module") from error
    finally:
        sys.path.remove("")
    return found


def _list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConvloraError(f"{text!r} is not a list of whole numbers with commas between them") from None
