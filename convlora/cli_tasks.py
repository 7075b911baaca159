"""`convlora eg3d render | mesh | interpolate | synthesize | direction | edit | invert | project | inpaint | upscale`.

Each opens the folder that `personalize` or `demo` left, and writes pictures and a result.json into a folder of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from convlora.cli_adapters import Output
from convlora.cli_device import add_options
from convlora.errors import ConvloraError

_EXITS, _BLENDS = ("stop", "continue", "project"), ("paste", "feather", "laplacian", "poisson")
_OPERATORS = ("area", "bicubic", "blur")
#: Verbs that go on where an interrupted call of the same command stopped.
RESUMING = ("synthesize", "invert", "project", "inpaint", "upscale")


def add_task_verbs(eg3d: Any) -> None:
    """Add the tasks to the verbs of `eg3d`."""
    render = _verb(eg3d, "render", _render, "turn the head: a film from an ellipse of cameras", out="film.mp4")
    _photo(render)
    render.add_argument("--frames", type=int, default=60, metavar="N", help="number of frames (default 60)")
    render.add_argument("--seconds", type=float, default=3.0, help="length of one round (default 3)")
    render.add_argument("--yaw", type=float, default=0.35, help="to each side, radians (default 0.35)")
    render.add_argument("--pitch", type=float, default=0.25, help="up and down, EG3D's parameter (default 0.25)")

    surface = _verb(eg3d, "mesh", _mesh, "the surface as a coloured mesh", out="head.ply")
    _photo(surface)
    surface.add_argument("--resolution", type=int, default=256, metavar="N", help="grid points a side (default 256)")
    surface.add_argument("--level", type=float, default=10.0, help="density of the surface (default 10)")

    line = _verb(eg3d, "interpolate", _interpolate, "the line between two photos of the person")
    line.add_argument("--start", metavar="PHOTO", help="name of a photo of the album (default: the first)")
    line.add_argument("--end", metavar="PHOTO", help="name of a photo of the album (default: the middle one)")
    line.add_argument("--weights", type=int, default=10, metavar="N", help="points on the line (default 10)")

    new = _verb(eg3d, "synthesize", _synthesize, "new appearances of the person, from random cameras")
    new.add_argument("--count", type=int, default=30, metavar="N", help="how many (default 30)")
    new.add_argument("--support", type=int, default=3, metavar="N", help="anchors mixed in each (default 3)")
    new.add_argument("--dilation", type=float, default=1.0, help="of the hull of the anchors (default 1: none)")
    new.add_argument("--truncation", type=float, default=1.0, help="towards the mean appearance (default 1: none)")
    new.add_argument("--frontal", action="store_true", help="all from the front, as attribute predictors like it")

    find = _verb(eg3d, "direction", _direction, "the direction of an attribute, from scored pictures", "d.safetensors")
    find.add_argument("samples", type=Path, metavar="SAMPLES", help="the folder that `synthesize` wrote")
    find.add_argument("--scores", type=Path, required=True, metavar="CSV", help="lines of picture name, score")
    find.add_argument("--attribute", required=True, metavar="NAME", help="what the scores mean, for the file")
    find.add_argument("--share", type=float, default=0.1, help="of the pictures, at either end (default 0.1)")

    edit = _verb(eg3d, "edit", _edit, "more or less of an attribute")
    _photo(edit)
    edit.add_argument("--direction", type=Path, required=True, metavar="FILE", help="what `direction` wrote")
    edit.add_argument("--strengths", default="-2:2:9", metavar="A:B:N", help="distances in W (default -2:2:9)")
    edit.add_argument("--dilation", type=float, default=2.0, help="how far from the anchors one may go (default 2)")
    edit.add_argument("--exit", choices=_EXITS, default="project", help="of an edit that leaves it (default project)")

    invert = _verb(eg3d, "invert", _invert, "invert new photos, tuning the generator to each")
    _album(invert)
    invert.add_argument("--target", choices=["adapter", "all", "none"], default="adapter", help="what is tuned")
    invert.add_argument("--steps", type=int, default=600, metavar="N", help="of the latent (default 600)")
    invert.add_argument("--tune-steps", type=int, default=350, metavar="N", help="of the tuning (default 350)")
    invert.add_argument("--views", type=int, default=4, metavar="N", help="novel views of each photo (default 4)")

    project = _verb(eg3d, "project", _project, "photos as points of the person's space, the generator untouched")
    _album(project)
    _projection(project)

    inpaint = _verb(eg3d, "inpaint", _inpaint, "fill holes in photos with the person's face")
    _album(inpaint)
    _projection(inpaint)
    hole = inpaint.add_mutually_exclusive_group()
    hole.add_argument("--hole", type=float, default=0.4, help="side of a square hole in the middle (default 0.4)")
    hole.add_argument("--masks", type=Path, metavar="FOLDER", help="grey PNGs by photo name, white = known")
    inpaint.add_argument("--blend", choices=_BLENDS, default="feather", help="of the seam (default feather)")

    upscale = _verb(eg3d, "upscale", _upscale, "bring tiny photos to full size")
    _album(upscale)
    _projection(upscale)
    upscale.add_argument("--factor", type=int, default=16, metavar="N", help="between small and full (default 16)")
    upscale.add_argument("--how", choices=_OPERATORS, default="area", help="it was made small (default area)")
    upscale.add_argument("--small", action="store_true", help="the album's photos are small already")


def _verb(eg3d: Any, name: str, run: Any, text: str, out: str | None = None) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = eg3d.add_parser(name, help=text, description=text)
    if name != "direction":
        parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of `personalize` or `demo`")
        parser.add_argument("--pretrained", action="store_true", help="without the person's adapter, to compare")
    help_ = "folder for the results" if out is None else f"file to write, e.g. {out}"
    parser.add_argument("--out", type=Path, required=True, help=help_)
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default 0)")
    add_options(parser)
    parser.set_defaults(run=run)
    return parser


def _photo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photo", metavar="NAME", help="a photo of the album (default: the first)")


def _album(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("album", type=Path, metavar="ALBUM", help="folder of photos with EG3D's dataset.json")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N photos")


def _projection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of the optimisation (default 300)")
    parser.add_argument("--dilation", type=float, default=2.0, help="of the hull of the anchors (default 2)")
    parser.add_argument("--per-layer", action="store_true", help="coefficients of their own for each layer")


# ------------------------------------------------------------------------------------------------ what they do


def _open(options: argparse.Namespace) -> Any:
    from convlora.cli_device import prepare_device
    from convlora.integrations.eg3d.personal import load_personal

    prepare_device(options.device)
    return load_personal(options.run_folder, options.device, options.pretrained)


def _photos(options: argparse.Namespace, me: Any, resolution: int | None = None) -> Any:
    photos = me.photos(options.album, resolution)
    if options.limit is not None:
        if not 1 <= options.limit <= len(photos):
            raise ConvloraError(f"--limit {options.limit}: {options.album} has {len(photos)} photos")
        photos = photos.first(options.limit)
    stems = [Path(name).stem for name in photos.names]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1} | {"sheet"} & set(stems))
    if twice:
        raise ConvloraError(
            f"results are written as <photo>.png beside sheet.png, and {options.album} has more than one of "
            f"{', '.join(twice)}: rename the photos"
        )
    return photos


def _run_folder(options: argparse.Namespace, photos: Any, names: tuple[str, ...]) -> Any:
    """The folder of results, with the options that made it; opened only when nothing is wrong with them."""
    from convlora.integrations.eg3d.run_folder import RunFolder

    for name in ("steps", "views", "tune_steps"):
        least = 1 if name == "steps" else 0
        if getattr(options, name, least) < least:
            raise ConvloraError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least} is needed")
    settings = {name: getattr(options, name) for name in (*names, "steps", "seed", "pretrained")}
    return RunFolder(options.out, {**settings, "run": str(options.run_folder.resolve()), "photos": photos.names})


def _render(options: argparse.Namespace) -> Output:
    me = _open(options)
    from convlora.integrations.eg3d import cameras
    from convlora.integrations.eg3d.images import save_animation
    from convlora.integrations.eg3d.tasks import novel_views

    orbit = cameras.orbit_of(me.G.rendering_kwargs)
    labels = cameras.random_views(options.frames, options.yaw, options.pitch, "orbit", **orbit)
    path = save_animation(options.out, novel_views(me.G, me.w(options.photo)[None], labels)[0], options.seconds)
    return _wrote(path, frames=options.frames)


def _mesh(options: argparse.Namespace) -> Output:
    me = _open(options)
    from convlora.integrations.eg3d.tasks import mesh

    found = mesh(
        me.G, me.w(options.photo), resolution=options.resolution, level=options.level, progress=not options.quiet
    )
    return _wrote(found.save(options.out), vertices=len(found.vertices), faces=len(found.faces))


def _interpolate(options: argparse.Namespace) -> Output:
    me = _open(options)
    import torch

    from convlora.integrations.eg3d import cameras
    from convlora.integrations.eg3d.images import save_animation, save_sheet
    from convlora.integrations.eg3d.tasks import interpolate

    names = me.anchors.names
    first, last = (me.photo(options.start), me.photo(options.end or names[len(names) // 2]))
    if first == last:
        raise ConvloraError(
            f"a line needs two photos, and both ends are {names[first]}; the run's are {', '.join(names)}"
        )
    ends = me.anchors.w[first], me.anchors.w[last]
    yaws = torch.tensor([-0.35, 0.0, 0.35])
    views = cameras.turned(yaws, **cameras.orbit_of(me.G.rendering_kwargs))
    images = interpolate(me.G, *ends, views, weights=options.weights)
    rows = [(f"yaw {yaw:+.2f}", images[:, i]) for i, yaw in enumerate(yaws.tolist())]
    save_sheet(options.out / "sheet.png", rows)
    save_animation(options.out / "film.mp4", images[:, 1], options.weights / 10)
    return _wrote(options.out / "sheet.png", film=str(options.out / "film.mp4"))


def _synthesize(options: argparse.Namespace) -> Output:
    me = _open(options)
    from convlora import files
    from convlora.integrations.eg3d import cameras
    from convlora.integrations.eg3d.run_folder import RunFolder
    from convlora.integrations.eg3d.tasks import synthesize

    names = ("count", "support", "dilation", "truncation", "frontal", "seed")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"run": str(options.run_folder.resolve()), "pretrained": options.pretrained}
    labels = cameras.frontal(options.count, **cameras.orbit_of(me.G.rendering_kwargs)) if options.frontal else None
    with RunFolder(options.out, settings) as folder:
        made = synthesize(
            me.G, me.hull(options.dilation), options.count, support=options.support, truncation=options.truncation,
            labels=labels, seed=options.seed, out=folder.path, progress=not options.quiet,
        )  # fmt: skip
        files.write(folder / "latents.safetensors", {"w": made.w, "alpha": made.alpha, "labels": made.labels}, {})
    return _wrote(options.out, pictures=options.count, latents=str(options.out / "latents.safetensors"))


def _direction(options: argparse.Namespace) -> Output:
    import csv

    import torch

    from convlora import files
    from convlora.integrations.eg3d.tasks.directions import find_direction

    w = files.read(options.samples / "latents.safetensors")[0]["w"]
    scores = torch.full((len(w),), float("nan"))
    with open(options.scores, newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.reader(file), 1):
            try:
                scores[int(Path(row[0]).stem)] = float(row[1])
            except (ValueError, IndexError):
                if line > 1:  # the first may be a heading
                    what = f"{options.scores}, line {line}: {row}"
                    raise ConvloraError(f"{what} is not the name of a picture and its score") from None
    missing = int(scores.isnan().sum())
    if missing:
        raise ConvloraError(f"{options.scores} scores {len(w) - missing} of the {len(w)} pictures of {options.samples}")
    found = find_direction(w, scores, options.attribute, share=options.share, seed=options.seed)
    told = {"accuracy": round(found.accuracy, 4), "accuracy_rest": round(found.accuracy_rest, 4)}
    return _wrote(found.save(options.out), attribute=options.attribute, **told)


def _edit(options: argparse.Namespace) -> Output:
    me = _open(options)
    import torch

    from convlora.integrations.eg3d import cameras
    from convlora.integrations.eg3d.images import save_sheet
    from convlora.integrations.eg3d.tasks import edit, personal_direction
    from convlora.integrations.eg3d.tasks.directions import Direction

    try:
        low, high, count = options.strengths.split(":")
        strengths = torch.linspace(float(low), float(high), int(count))
    except (ValueError, RuntimeError):
        raise ConvloraError(f"--strengths {options.strengths}: write first:last:number, such as -2:2:9") from None
    hull = me.hull(options.dilation)
    direction = personal_direction(hull, Direction.load(options.direction).normal)
    alpha = torch.zeros(1, len(hull.anchors)).to(hull.anchors)
    alpha[0, me.photo(options.photo)] = 1
    front = cameras.frontal(1, **cameras.orbit_of(me.G.rendering_kwargs))
    found = edit(me.G, hull, alpha, direction, strengths, front, exit=options.exit)
    save_sheet(options.out / "sheet.png", [(options.strengths, found.images[:, 0])])
    inside = found.inside[:, 0].tolist()
    return _wrote(options.out / "sheet.png", cosine=round(direction.cosine, 4), inside=inside)


def _invert(options: argparse.Namespace) -> Output:
    me = _open(options)
    from convlora.integrations.eg3d import cameras
    from convlora.integrations.eg3d.networks import choose_networks
    from convlora.integrations.eg3d.tasks import invert

    photos = _photos(options, me)
    folder = _run_folder(options, photos, ("target", "tune_steps"))
    networks, _ = choose_networks(me.generator, device=options.device)
    views = cameras.random_views(options.views, seed=options.seed, **cameras.orbit_of(me.G.rendering_kwargs))
    with folder:
        found = invert(
            me.G, photos, options.steps, options.tune_steps, target=options.target, views=views, out=folder.path,
            init=networks.encoder or "mean", perceptual=networks.perceptual, seed=options.seed,
            progress=not options.quiet,
        )  # fmt: skip
    turned = [(f"view {i + 1}", found.views[:, i]) for i in range(options.views)]
    return _pictures(options, photos, found.images, [("photo", photos.images), ("inversion", found.images), *turned])


def _projected(options: argparse.Namespace, me: Any, photos: Any, task: Any, names: tuple[str, ...] = ()) -> Any:
    """What `task` makes of photos and the person's space; an interrupted call goes on in the same folder."""
    from convlora.integrations.eg3d.networks import choose_networks
    from convlora.integrations.eg3d.tasks.project import check_hull

    hull = me.hull(options.dilation)
    check_hull(me.G, hull)
    folder = _run_folder(options, photos, ("dilation", "per_layer", *names))
    networks, _ = choose_networks(me.generator, device=options.device)
    with folder:
        return task(
            me.G, photos, hull, steps=options.steps, per_layer=options.per_layer, perceptual=networks.perceptual,
            seed=options.seed, out=folder.path, progress=not options.quiet,
        )  # fmt: skip


def _project(options: argparse.Namespace) -> Output:
    me = _open(options)
    from convlora.integrations.eg3d.tasks import project

    photos = _photos(options, me)
    found = _projected(options, me, photos, project)
    return _pictures(options, photos, found.images, [("photo", photos.images), ("projection", found.images)])


def _inpaint(options: argparse.Namespace) -> Output:
    me = _open(options)
    from functools import partial

    from convlora.integrations.eg3d.segment import masks_from_files
    from convlora.integrations.eg3d.tasks import inpaint
    from convlora.integrations.eg3d.tasks.blend import check_blend
    from convlora.integrations.eg3d.tasks.degrade import center_hole
    from convlora.integrations.eg3d.tasks.inpaint import holed

    photos = _photos(options, me)
    if options.masks is None:
        known = center_hole(me.G.img_resolution, options.hole)
    else:
        known = masks_from_files(options.masks, photos.names)(photos.images)
        _check_sizes(options, photos.names, me.G.img_resolution)
        options.masks = str(options.masks.resolve())
    check_blend(options.blend)
    holed(photos, known)  # so that a wrong mask leaves no folder
    task = partial(inpaint, known=known, how=options.blend)
    found = _projected(options, me, photos, task, ("hole", "masks", "blend"))
    rows = [("photo", photos.images), ("seen", photos.images * known), ("inpainted", found.images)]
    return _pictures(options, photos, found.images, rows)


def _check_sizes(options: argparse.Namespace, names: list[str], resolution: int) -> None:
    """Masks must be of their photo's size, or of the generator's: of any other, it is unclear what they cover."""
    from PIL import Image

    for name in names:
        path = options.masks / f"{Path(name).stem}.png"
        with Image.open(path) as mask, Image.open(options.album / name) as photo:
            if mask.size not in (photo.size, (resolution, resolution)):
                raise ConvloraError(
                    f"{path} is {mask.width}×{mask.height}; {name} is {photo.width}×{photo.height}: make the mask of "
                    f"the photo's size, or {resolution}×{resolution}"
                )


def _upscale(options: argparse.Namespace) -> Output:
    me = _open(options)
    from dataclasses import replace
    from functools import partial

    from convlora.integrations.eg3d.tasks import upscale
    from convlora.integrations.eg3d.tasks.degrade import downsample

    side = me.G.img_resolution
    if options.factor < 2 or side % options.factor:
        raise ConvloraError(f"--factor {options.factor} does not divide the generator's {side} pixels")
    small = _photos(options, me, side // options.factor if options.small else side)
    if not options.small:
        small = replace(small, images=downsample(small.images, options.factor, options.how), masks=None)
    found = _projected(options, me, small, partial(upscale, how=options.how), ("factor", "how", "small"))
    shown = small.images.repeat_interleave(options.factor, 2).repeat_interleave(options.factor, 3)
    return _pictures(options, small, found.images, [("given", shown), ("upscaled", found.images)])


def _pictures(options: argparse.Namespace, photos: Any, images: Any, rows: Any) -> Output:
    """Write every image by its photo's name, and the sheet of all rows."""
    from convlora.integrations.eg3d.images import save_png, save_sheet

    for name, image in zip(photos.names, images):
        save_png(options.out / f"{Path(name).stem}.png", image)
    return _wrote(save_sheet(options.out / "sheet.png", rows), photos=len(photos))


def _wrote(path: Path, **more: Any) -> Output:
    told = ", ".join(f"{name} {value}" for name, value in more.items())
    return Output(f"{path}  ({told})", {"path": str(path), **json.loads(json.dumps(more))})
