"""Table 1 and figure 12: unseen photos inverted with and without tuning the weights to them."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.integrations.eg3d.metrics import id_sim, psnr
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, PRETRAINED, Cohort, Kind, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import invert, novel_views, project

MODELS = (PRETRAINED, FULL, LORA)
METRICS = {
    "perceptual": "distance to the photo in its own view; lower is better",
    "PSNR": "dB, of the same; higher is better",
    "ID_sim": "of novel views, largest cosine with the person's photos; higher is better",
}


def claims(metric: str = "ID_sim", margin: float = 0.02) -> list[Claim]:
    """What the paper says in tables 1 to 4 of identity."""
    return [
        Claim("LoRA keeps identity better than the pretrained generator", metric, LORA.label, PRETRAINED.label),
        Claim("LoRA is about as good as full fine-tuning", metric, LORA.label, FULL.label, -margin),
    ]


def identity(cohort: Cohort, subject: Subject, views: Tensor) -> Tensor:
    """(N,): ID_sim of views (N, V, 3, R, R), averaged over V."""
    embeddings = cohort.embed(views.flatten(0, 1))
    return id_sim(embeddings, subject.reference).view(len(views), -1).mean(1)


def table_1(cohort: Cohort, effort: Effort) -> Results:
    """Pivotal tuning on every held-out photo, all weights, from the pretrained, fully tuned and adapted generator."""
    paper = {
        PRETRAINED.label: {"perceptual": "LPIPS .19, DISTS .12", "ID_sim": ".56"},
        FULL.label: {"perceptual": "LPIPS .12, DISTS .08", "ID_sim": ".60"},
        LORA.label: {"perceptual": "LPIPS .13, DISTS .08", "ID_sim": ".61"},
    }
    results = Results("T1", "Inversion with pivotal tuning (table 1)", METRICS, claims(), paper)
    for subject in cohort.subjects():
        photos = subject.test if effort.photos is None else subject.test.first(effort.photos)
        for kind in MODELS:
            found = invert(
                cohort.model(subject, kind), photos, effort.latent_steps, effort.tune_steps, target="all",
                views=cohort.views(effort.views), init=cohort.networks.encoder or "mean", lr=cohort.settings.anchor_lr,
                perceptual=cohort.networks.perceptual, seed=subject.seed, progress=cohort.progress,
            )  # fmt: skip
            _add(results, cohort, subject, kind, photos.names, photos.images, found.images, found.views)
    return results


def figure_12(cohort: Cohort, effort: Effort) -> Results:
    """The photos' projection into the personal space, weights untouched."""
    results = Results("F12", "Inversion without tuning weights (figure 12)", METRICS, claims())
    results.notes.append("The paper shows pictures of this and no numbers.")
    for subject in cohort.subjects():
        photos = subject.test if effort.photos is None else subject.test.first(effort.photos)
        for kind in MODELS:
            model = cohort.model(subject, kind)
            torch.manual_seed(subject.seed)
            found = project(
                model, photos, cohort.hull(subject), effort.project_steps, per_layer=True,
                perceptual=cohort.networks.perceptual, progress=cohort.progress,
            )  # fmt: skip
            views = novel_views(model, found.ws, cohort.views(effort.views))
            _add(results, cohort, subject, kind, photos.names, photos.images, found.images, views)
    return results


def _add(
    results: Results, cohort: Cohort, subject: Subject, kind: Kind, names: list[str], photos: Tensor, images: Tensor,
    views: Tensor,
) -> None:  # fmt: skip
    who = (subject.person.name, subject.seed)
    results.add(kind.label, "perceptual", *who, by_name(names, cohort.perceptual(images, photos)))
    results.add(kind.label, "PSNR", *who, by_name(names, psnr(images, photos)))
    results.add(kind.label, "ID_sim", *who, by_name(names, identity(cohort, subject, views)))
