"""From an album to a personal generator and its report: anchors, personalisation, comparison, pictures."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import convlora
from convlora import Adapter
from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Album, Photos
from convlora.integrations.eg3d.anchors import Anchors, Encoder, find_anchors
from convlora.integrations.eg3d.camera_refinement import CameraPrior, landmark_prior
from convlora.integrations.eg3d.checkpoint import save_generator
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.losses import Perceptual, completed
from convlora.integrations.eg3d.metrics import IdentityEncoder, described, id_sim, psnr
from convlora.integrations.eg3d.personalize import Preset, inject_personal, parameter_groups, part_of, tune, unfreeze
from convlora.integrations.eg3d.precision import Precision
from convlora.integrations.eg3d.report import Plan, Report, Row, Spread, explore
from convlora.integrations.eg3d.run_folder import RunFolder
from convlora.integrations.eg3d.tasks import Hull, make_hull, novel_views
from convlora.integrations.eg3d.tasks.directions import Direction

PRETRAINED, FULL = "pretrained", "full fine-tuning"
TUNE_OPTIONS = ("accumulate", "checkpointing", "precision", "patience")  # of Settings: `tune`'s, None its defaults
_WATCHED = 8  # with patience, one training photo of so many is watched


@dataclass(frozen=True)
class Settings:
    """How a person is learned and measured. The defaults suit 512² generators on a GPU; the demo has its own.

    The last four are `tune`'s, None being its defaults. With `patience` every eighth training photo is watched and not
    tuned to: photos held out for measuring must not choose the weights that they measure.
    """

    rank: int = 1
    preset: Preset = "true_rank"
    anchor_steps: int = 500
    anchor_lr: float = 0.01
    steps: int = 2000
    batch_size: int = 4
    lr: float = 0.002  # of the low-rank factors
    lr_full: float = 0.002  # of tensors trained in full: the decoder here, everything in full fine-tuning
    perceptual_weight: float = 1.0
    compare_full: bool = False
    views: int = 4  # novel views per held-out photo for ID_sim
    frames: int = 21  # of the turntable, unless a `Plan` says more
    yaw: float = 0.45  # radians to each side in the turntable
    refine_camera: Literal["rotation", "full", "off"] | None = None  # None: "full" if they are from landmarks
    seed: int = 0
    accumulate: int | None = None
    checkpointing: bool | None = None
    precision: Precision | None = None
    patience: int | None = None


class Networks(NamedTuple):
    """The networks a run measures with; None where there is none for these pictures."""

    perceptual: Perceptual | None = None
    identity: IdentityEncoder | None = None
    encoder: Encoder | None = None


class Evaluation(NamedTuple):
    images: Tensor  # reconstructions of the held-out photos (N, 3, R, R)
    metrics: dict[str, Spread]
    moved_degrees: Tensor | None  # by which their cameras were refined (N,)


def check_settings(G: TriPlaneGenerator, settings: Settings) -> None:
    """Raise now what personalising G would raise after minutes of inversion: an unknown preset, an impossible rank."""
    inject_personal(G, settings.rank, settings.preset).remove()
    if settings.accumulate is not None:
        part_of(settings.batch_size, settings.accumulate)


def personalize_album(
    G: TriPlaneGenerator, album: Album, out: RunFolder, settings: Settings, networks: Networks, *,
    directions: Callable[[Hull], Sequence[Direction]] = lambda hull: (), plan: Plan | None = None, command: str = "",
    progress: bool = True,
) -> Report:  # fmt: skip
    """Run every stage, each resumable, into the open folder `out`; G stays as it is.

    Writes `anchors.safetensors`, `adapter.safetensors`, the checkpoints of what is under way, and `sheets/` with the
    pictures that the page's sliders show. `directions` gives the attributes that are edited on the page, for the
    person's hull; `plan` says how many pictures are drawn (None: `settings.frames` yaws).
    """
    if settings.refine_camera is None:
        settings = replace(settings, refine_camera="full" if album.face_model else "off")
    prior = _camera_prior(album)
    with out.timed("anchors"):
        anchors = invert(G, album.train, out, "anchors", settings, networks, progress, prior)
    models: dict[str, TriPlaneGenerator] = {PRETRAINED: G}
    rows = {PRETRAINED: Row(PRETRAINED, 0, None, None, {})}
    curves = {}
    personal = f"LoRA rank {settings.rank}"
    for name in [FULL] * settings.compare_full + [personal]:
        with out.timed(name):
            models[name], rows[name], curves[name] = _tuned(name, G, album, anchors, out, settings, networks, progress)
    for name, row in rows.items():
        row.seconds = out.seconds().get(name)
    heldout: dict[str, Tensor] = {}
    moved = {} if anchors.moved_degrees is None else {"training photos": anchors.moved_degrees.tolist()}
    reference = _embed(networks.identity, album.train.images)
    for name, model in models.items():
        if len(album.test):
            with out.timed("evaluation"):
                found = evaluate(model, album.test, reference, out, name, settings, networks, progress, prior)
            heldout[name], rows[name].metrics = found.images, found.metrics
            if found.moved_degrees is not None:
                moved[f"held-out photos, {name}"] = found.moved_degrees.tolist()
    plan = plan or Plan(yaws=settings.frames, yaw=settings.yaw)
    hull = make_hull(anchors.w)
    with out.timed("page"):
        stages = explore(
            models, hull, list(zip(album.train.names, album.train.images)), directions(hull), plan=plan,
            folder=out / "sheets", progress=progress,
        )  # fmt: skip
    told = [(key, value) for key, value in asdict(settings).items() if value is not None]
    return Report(
        title=f"A personal 3D generator of {album.person}",
        person=album.person,
        notice=_notice(album),
        command=command,
        environment=environment(next(G.parameters()).device),
        settings={**{key: str(value) for key, value in told}, "frames": plan.grid},
        album=album.train.images,
        rows=list(rows.values()),
        metric_notes=_metric_notes(networks),
        heldout_names=album.test.names,
        heldout_truth=album.test.images,
        heldout=heldout,
        stages=stages,
        curves=curves,
        moved_degrees=moved,
    )


_METRICS = {
    "PSNR": "dB, of held-out photos against their inversion; higher is better",
    "perceptual": "distance of held-out photos to their inversion; lower is better",
    "ID_sim": "largest cosine of novel views with the person's training photos (My3DGen eq. 2); higher is better",
}


def _metric_notes(networks: Networks) -> dict[str, str]:
    """What each metric is, with the network that measured it and the digests of its weights."""
    measured_by = {"perceptual": described(networks.perceptual), "ID_sim": described(networks.identity)}
    return {metric: "; ".join(filter(None, [note, measured_by.get(metric)])) for metric, note in _METRICS.items()}


def invert(
    G: TriPlaneGenerator, photos: Photos, out: RunFolder, name: str, settings: Settings, networks: Networks,
    progress: bool, prior: CameraPrior = CameraPrior(),  # noqa: B008 (immutable)
) -> Anchors:  # fmt: skip
    """W inversion with the run's settings, kept in `<name>.safetensors` of the folder."""
    refine = settings.refine_camera
    return find_anchors(
        G, photos, settings.anchor_steps, init=networks.encoder or "mean", perceptual=networks.perceptual,
        perceptual_weight=settings.perceptual_weight, lr=settings.anchor_lr, seed=settings.seed,
        refine_camera=None if refine == "off" else refine, camera_prior=prior,
        checkpoint=out / f"{name}.safetensors", progress=progress, description=f"inverting ({name})",
    )  # fmt: skip


def evaluate(
    G: TriPlaneGenerator, photos: Photos, reference: Tensor | None, out: RunFolder, name: str, settings: Settings,
    networks: Networks, progress: bool, prior: CameraPrior = CameraPrior(),  # noqa: B008 (immutable)
) -> Evaluation:  # fmt: skip
    """Invert held-out photos with the weights frozen, then compare: in their own view, and identity in novel ones.

    Their cameras are measurements too: where the album's are refined, so are these. Padded pixels do not count.
    """
    found = invert(G, photos, out, heldout_name(name), settings, networks, progress, prior)
    w, labels = found.w, photos.labels if found.labels is None else found.labels
    images = novel_views(G, w, labels[:, None])[:, 0]
    metrics = {"PSNR": Spread.of(psnr(images, photos.images, photos.masks))}
    if networks.perceptual is not None:
        truth = photos.images if photos.masks is None else completed(photos.images, photos.masks, images)
        with torch.no_grad():
            metrics["perceptual"] = Spread.of(networks.perceptual(images, truth).flatten())
    if networks.identity is not None and reference is not None:
        views = novel_views(
            G, w, cameras.random_views(settings.views, seed=settings.seed, **cameras.orbit_of(G.rendering_kwargs))
        )
        embeddings = _embed(networks.identity, views.flatten(0, 1))
        assert embeddings is not None
        metrics["ID_sim"] = Spread.of(id_sim(embeddings, reference).view(len(photos), -1).mean(1))
    return Evaluation(images, metrics, found.moved_degrees)


def heldout_name(model: str) -> str:
    """Under which name `invert` keeps the latents of the held-out photos for a model."""
    return f"heldout_{''.join(c if c.isalnum() else '_' for c in model)}"


def _tuned(
    name: str, G: TriPlaneGenerator, album: Album, anchors: Anchors, out: RunFolder, settings: Settings,
    networks: Networks, progress: bool,
) -> tuple[TriPlaneGenerator, Row, list[tuple[int, float]]]:  # fmt: skip
    model = copy.deepcopy(G)
    adapter: Adapter | None = None
    groups: list[dict[str, Any]]
    if name == FULL:
        groups = [{"params": unfreeze(model), "lr": settings.lr_full}]
    else:
        torch.manual_seed(settings.seed)
        adapter = inject_personal(model, settings.rank, settings.preset)
        groups = parameter_groups(adapter, settings.lr, settings.lr_full)
    trainables = sum(p.numel() for group in groups for p in group["params"])
    photos, at, options = _watching(album.train, anchors, settings)
    curve = tune(
        model, photos, at, groups, steps=settings.steps, batch_size=settings.batch_size,
        perceptual=networks.perceptual, perceptual_weight=settings.perceptual_weight, seed=settings.seed,
        checkpoint=out / f"{'full' if name == FULL else 'adapter'}.ckpt", progress=progress, description=name,
        **options,
    )  # fmt: skip
    if adapter is None:
        model.requires_grad_(False)
        path = save_generator(model, out / "full.safetensors")
        return model, Row(name, trainables, path.stat().st_size, None, {}), curve
    path = adapter.save(out / "adapter.safetensors", person=album.person, consent=_consent(album))
    labels = album.train.labels if anchors.labels is None else anchors.labels
    check_reload(G, model, path, anchors.w[:1], labels[:1])
    for p in adapter.parameters():
        p.requires_grad_(False)
    return model, Row(name, trainables, path.stat().st_size, None, {}), curve


def _watching(photos: Photos, anchors: Anchors, settings: Settings) -> tuple[Photos, Anchors, dict[str, Any]]:
    """The photos to tune to, their anchors, and `tune`'s options, among them the photos to watch."""
    options = {name: getattr(settings, name) for name in TUNE_OPTIONS if getattr(settings, name) is not None}
    if settings.patience is None:
        return photos, anchors, options
    if len(photos) < 2:
        raise ConvloraError(f"patience={settings.patience} needs 2 training photos or more, one of them to watch")
    watched = list(range(_WATCHED - 1, len(photos), _WATCHED)) or [len(photos) - 1]
    rest = [i for i in range(len(photos)) if i not in watched]
    options["held_out"] = photos.part(watched), anchors.part(watched)
    return photos.part(rest), anchors.part(rest), options


def check_reload(G: TriPlaneGenerator, model: TriPlaneGenerator, path: Path, w: Tensor, label: Tensor) -> None:
    """The file, on a fresh copy of the base, must give the very images of the model it was saved from."""
    fresh = copy.deepcopy(G)
    convlora.load_adapter(fresh, path)
    if not torch.equal(novel_views(fresh, w, label), novel_views(model, w, label)):
        raise ConvloraError(f"{path} does not reproduce the model it was saved from; please report this")


def _embed(identity: Callable[[Tensor], Tensor] | None, images: Tensor) -> Tensor | None:
    if identity is None:
        return None
    with torch.no_grad():
        return torch.cat([identity(chunk).cpu() for chunk in images.split(64)])


def environment(device: torch.device | str) -> dict[str, str]:
    """What a result was made on: device, torch, convlora, date."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    date = datetime.date.today().isoformat()
    return {"device": name, "torch": torch.__version__, "convlora": convlora.__version__, "date": date}


def _notice(album: Album) -> str:
    if album.procedural:
        return "Procedural: every picture shows a head drawn by a program. No photograph of a person was used."
    return "Made from photographs of a person: keep it private unless that person agreed to its publication."


def _camera_prior(album: Album) -> CameraPrior:
    from convlora.integrations.eg3d.prepare.face_model import MODELS

    known = MODELS.get(album.face_model or "")
    return landmark_prior(known.points3d) if known else CameraPrior()


def _consent(album: Album) -> str:
    return "procedural person, none needed" if album.procedural else album.consent
