"""`convlora eg3d instant` and `hypernetwork`: a person from one photo, and the network that predicts them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convlora.cli_adapters import Output
from convlora.cli_device import add_options
from convlora.errors import ConvloraError

#: Verbs that go on where an interrupted call of the same command stopped.
RESUMING = ("instant", "hypernetwork")


def add_verbs(eg3d: Any) -> None:
    """Add both to the verbs of `eg3d`."""
    instant = _verb(eg3d, "instant", _instant, "a personal generator from one photo, in seconds")
    instant.add_argument("photo", type=Path, help="a photo of an album (its dataset.json has the camera), or any photo")
    instant.add_argument(
        "--hypernetwork", metavar="FILE", help="what predicts; none: tuning alone (default: the lab's)"
    )
    instant.add_argument("--out", type=Path, required=True, help="output folder, new or of the same run")
    instant.add_argument("--steps", type=int, default=40, metavar="N", help="of tuning to the photo (default 40)")
    instant.add_argument("--rank", type=int, default=4, help="of what is tuned (default 4)")
    instant.add_argument("--refinements", type=int, metavar="K", help="of the prediction (default: the network's own)")
    instant.add_argument("--anchor-steps", type=int, metavar="N", help="of the inversion (default 500, for the lab 25)")
    instant.add_argument("--views", type=int, default=4, metavar="N", help="novel views on the sheet (default 4)")
    instant.add_argument("--person", metavar="NAME", help="who it is (default: as the album says)")
    instant.add_argument("--consent", metavar="TEXT", help="who agreed to what (default: as the album says)")
    instant.add_argument("--species", choices=["face", "cat", "lab"], default="face", help="of a photo without album")
    instant.add_argument("--landmarks", type=Path, metavar="FILE", help="of it, your own, .json or .csv")
    instant.add_argument("--detector", type=Path, metavar="PATH", help="of it, YuNet's .onnx (default: fetched once)")

    learn = _verb(eg3d, "hypernetwork", _hypernetwork, "train the network that predicts adapters, on albums of people")
    learn.add_argument("albums", type=Path, nargs="+", metavar="ALBUM", help="folders of photos, a person each")
    learn.add_argument("--out", type=Path, required=True, help="file to write; what is under way is kept beside it")
    learn.add_argument("--steps", type=int, default=20_000, metavar="N", help="of the training (default 20000)")
    learn.add_argument(
        "--taught", type=int, default=1000, metavar="N", help="photos with adapters that teach (default 1000)"
    )
    learn.add_argument("--taught-steps", type=int, default=200, metavar="N", help="of each of those (default 200)")
    learn.add_argument("--photos", type=int, metavar="N", help="of each album at most (default: all)")
    learn.add_argument("--anchor-steps", type=int, metavar="N", help="of each inversion (default 500, for the lab 25)")
    learn.add_argument("--batch-size", type=int, default=8, metavar="N", help="people per step (default 8)")
    learn.add_argument("--encoder", default="vit", help='"vit", "lab-identity", "timm:MODEL" or "transformers:MODEL"')
    learn.add_argument("--identity", metavar="NAME[:PATH]", help="the identity encoder, as for personalize")


def _verb(eg3d: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = eg3d.add_parser(name, help=text, description=text)
    parser.add_argument("--generator", default="lab", help='"lab", "lab-cats" or a generator\'s .safetensors')
    parser.add_argument("--perceptual", metavar="NAME[:PATH]", help="the perceptual distance, as for personalize")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default 0)")
    add_options(parser)
    parser.set_defaults(run=run)
    return parser


def _opened(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The generator, its networks, and options of `find_anchors`."""
    from convlora.cli_device import prepare_device

    prepare_device(options.device)
    import sys

    from convlora.integrations.eg3d.checkpoint import SHIPPED, load_generator
    from convlora.integrations.eg3d.demo import LAB_SETTINGS
    from convlora.integrations.eg3d.networks import choose_networks
    from convlora.integrations.eg3d.pipeline import Settings

    settings = LAB_SETTINGS if options.generator in SHIPPED else Settings()
    G = load_generator(options.generator, options.device).requires_grad_(False)
    identity = getattr(options, "identity", None if options.generator in SHIPPED else "none")
    networks, told = choose_networks(options.generator, options.perceptual, identity, options.device)
    for line in told:
        print(f"convlora: {line}", file=sys.stderr)
    steps = settings.anchor_steps if options.anchor_steps is None else options.anchor_steps
    return G, networks, {"steps": steps, "lr": settings.anchor_lr, "init": networks.encoder or "mean"}


def _instant(options: argparse.Namespace) -> Output:
    for name, least in (("steps", 0), ("rank", 1), ("views", 0)):
        if getattr(options, name) < least:
            raise ConvloraError(f"--{name} {getattr(options, name)}: at least {least} is needed")
    if not options.photo.is_file():
        raise ConvloraError(f"no photo at {options.photo}")
    G, networks, inversion = _opened(options)
    hyper = _chosen(options)
    if hyper is None and not options.steps:
        raise ConvloraError("--hypernetwork none --steps 0: nothing would change; give one of them")
    aligned = (options.photo.parent / "dataset.json").is_file()
    if aligned and (options.landmarks or options.detector):
        raise ConvloraError(f"{options.photo} is of an album, with its camera: --landmarks and --detector find others")
    from convlora.integrations.eg3d.run_folder import RunFolder

    names = ("generator", "steps", "rank", "refinements", "anchor_steps", "hypernetwork", "seed", "perceptual")
    album = options.photo.parent if aligned else options.out / "album"
    settings = {name: getattr(options, name) for name in names}
    settings |= {"photo": str(options.photo.resolve()), "album": str(album.resolve())}
    with RunFolder(options.out, settings) as folder:
        if not aligned:
            _prepare(options, album)
        return _personal(options, G, networks, inversion, hyper, folder, album)


def _chosen(options: argparse.Namespace) -> Any:
    """The hypernetwork that was asked for; None without."""
    from convlora.integrations.eg3d.hyper.opening import open_hypernetwork

    if options.hypernetwork == "none":
        return None
    if options.hypernetwork is None and not _shipped(options.generator):
        raise ConvloraError(
            f"there is no hypernetwork for {options.generator}: --hypernetwork FILE, which `convlora eg3d "
            "hypernetwork` trains, or --hypernetwork none to tune without one"
        )
    return open_hypernetwork(options.hypernetwork or "lab", options.device)


def _shipped(generator: str) -> bool:
    """Whether a hypernetwork for it comes with the package."""
    if generator != "lab":
        return False
    from convlora.integrations.eg3d.lab.hyper import shipped

    return shipped().is_file()


def _prepare(options: argparse.Namespace, album: Path) -> None:
    """Align the photo and work out its camera; it is only read."""
    from convlora.integrations.eg3d.prepare import LandmarkDetector, LandmarkFile, YuNet, prepare

    detector: LandmarkDetector | None = None
    if options.landmarks:
        detector = LandmarkFile(options.landmarks)
    elif options.detector:
        detector = YuNet(options.detector)
    prepare(
        options.photo, album, detector=detector, species=options.species, keep_all=True, person=options.person,
        consent=options.consent or "not recorded", progress=not options.quiet,
    )  # fmt: skip


def _personal(
    options: argparse.Namespace, G: Any, networks: Any, inversion: dict[str, Any], hyper: Any, folder: Any, album: Path
) -> Output:
    import convlora
    from convlora.integrations.eg3d import cameras
    from convlora.integrations.eg3d.album import load_album
    from convlora.integrations.eg3d.anchors import find_anchors
    from convlora.integrations.eg3d.hyper import instant
    from convlora.integrations.eg3d.images import save_sheet
    from convlora.integrations.eg3d.tasks import novel_views

    found = load_album(album, G.img_resolution)
    photos = found.photos
    which = photos.names.index(options.photo.name) if options.photo.name in photos.names else 0
    photo = photos.part([which])
    inversion |= _refinement(found)
    with folder.timed("inversion"):
        anchors = find_anchors(
            G, photo, perceptual=networks.perceptual, seed=options.seed, checkpoint=folder / "anchors.safetensors",
            progress=not options.quiet, **inversion,
        )  # fmt: skip
    before = novel_views(G, anchors.w, _cameras(photo, anchors)[:, None])[:, 0]
    person = options.person or found.person
    consent = options.consent or ("procedural person, none needed" if found.procedural else found.consent)
    path = folder / "adapter.safetensors"
    if path.is_file():
        adapter, seconds = convlora.load_adapter(G, path), {}
    else:
        done = instant(
            G, photo, hyper, anchors=anchors, steps=options.steps, rank=options.rank, refinements=options.refinements,
            perceptual=networks.perceptual, seed=options.seed, progress=not options.quiet,
        )  # fmt: skip
        adapter, seconds = done.adapter, {**done.seconds, "inversion": folder.seconds()["inversion"]}
        done.save(path, person=person, consent=consent)
    views = cameras.random_views(options.views, seed=options.seed, **cameras.orbit_of(G.rendering_kwargs))
    after = novel_views(G, anchors.w, _cameras(photo, anchors)[:, None])[:, 0]
    rows = [("photo", photo.images), ("pretrained", before), ("personal", after)]
    if options.views:
        rows.append(("novel views", novel_views(G, anchors.w, views)[0]))
    sheet = save_sheet(folder / "sheet.png", rows)
    told = {stage: round(spent, 2) for stage, spent in seconds.items()}
    size = path.stat().st_size
    lines = [f"{person}: {adapter!r}", *(f"{stage:11} {spent:.2f} s" for stage, spent in told.items())]
    lines += [f"adapter     {path}  ({size:,} bytes)", f"look at     {sheet}"]
    if consent == "not recorded":
        lines += ["consent is not recorded: --consent TEXT puts it into the adapter"]
    return Output("\n".join(lines), {"adapter": str(path), "bytes": size, "sheet": str(sheet), "seconds": told})


def _refinement(album: Any) -> dict[str, Any]:
    """Options of `find_anchors`: cameras that were worked out from landmarks are measurements, and refined."""
    from convlora.integrations.eg3d.camera_refinement import landmark_prior
    from convlora.integrations.eg3d.prepare.face_model import MODELS

    if album.face_model not in MODELS:
        return {}
    return {"refine_camera": "full", "camera_prior": landmark_prior(MODELS[album.face_model].points3d)}


def _cameras(photo: Any, anchors: Any) -> Any:
    return photo.labels if anchors.labels is None else anchors.labels


def _hypernetwork(options: argparse.Namespace) -> Output:
    for name in ("steps", "taught_steps", "batch_size"):
        if getattr(options, name) < 1:
            raise ConvloraError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1 is needed")
    G, networks, inversion = _opened(options)
    from convlora.integrations.eg3d.album import load_album
    from convlora.integrations.eg3d.run_folder import RunFolder

    albums = [load_album(folder, G.img_resolution) for folder in options.albums]
    names = ("generator", "photos", "anchor_steps", "perceptual", "encoder", "seed")
    settings = {name: getattr(options, name) for name in names}
    settings["albums"] = [str(folder.resolve()) for folder in options.albums]
    with RunFolder(options.out.with_suffix(".work"), settings) as work:
        return _learn(options, G, networks, inversion, albums, work)


def _learn(
    options: argparse.Namespace, G: Any, networks: Any, inversion: dict[str, Any], albums: list[Any], work: Any
) -> Output:
    from dataclasses import replace

    import torch

    from convlora.integrations.eg3d.anchors import find_anchors
    from convlora.integrations.eg3d.hyper import Examples, HyperNetwork, Plan, make_examples, supervise, train
    from convlora.integrations.eg3d.hyper.opening import encoder_named

    torch.manual_seed(options.seed)
    hyper = HyperNetwork.for_generator(
        G, encoder=encoder_named(options.encoder, options.device), encoder_name=options.encoder
    )
    examples: Examples | None = None
    for i, album in enumerate(albums):
        photos = album.train.first(options.photos or len(album.train))
        anchors = find_anchors(
            G, photos, perceptual=networks.perceptual, checkpoint=work / f"anchors_{i:05d}.safetensors",
            seed=options.seed, progress=not options.quiet, description=f"inverting {album.person}", **inversion,
            **_refinement(album),
        )  # fmt: skip
        photos = replace(photos, labels=_cameras(photos, anchors))
        more = make_examples(G, photos, anchors.w, torch.zeros(len(photos), dtype=torch.long))
        examples = more if examples is None else examples.joined(more)
    assert examples is not None
    # people take turns among the photos that teach
    order = torch.argsort(_turns(examples.person), stable=True)
    examples = examples.rows(order)
    adapter = hyper.inject(G)
    quiet: dict[str, Any] = {
        "progress": not options.quiet,
        "perceptual": networks.perceptual,
        "identity": networks.identity,
    }
    taught = None
    if options.taught:
        first = torch.arange(min(options.taught, len(examples)))
        taught = supervise(
            adapter, examples.rows(first), options.taught_steps, seed=options.seed,
            checkpoint=work / "codes.safetensors", **quiet,
        )  # fmt: skip
    plan = Plan(options.steps, options.batch_size, seed=options.seed)
    history = train(hyper, adapter, examples, taught, plan=plan, checkpoint=work / "train.ckpt", **quiet)
    adapter.remove()
    path = hyper.save(options.out, generator=options.generator)
    losses = {name: round(value, 5) for name, value in history[-1][1].items()}
    told = ", ".join(f"{name} {value}" for name, value in losses.items())
    people = len(albums)
    text = f"{path}  ({path.stat().st_size:,} bytes; {len(examples)} photos of {people} people; last losses: {told})"
    return Output(text, {"path": str(path), "photos": len(examples), "people": people, "losses": losses})


def _turns(person: Any) -> Any:
    """(N,): the how-manieth photo of its person each is."""
    import torch

    same = (person[:, None] == person[None]) & torch.ones(len(person), len(person)).tril(-1).bool()
    return same.sum(1)
