"""Table 1 and figure 12: unseen photos inverted with and without tuning the weights to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convlora.integrations.eg3d.metrics import id_sim, psnr
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, PRETRAINED, Cohort, Kind, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import invert, project
from convlora.integrations.eg3d.tasks.views import Views, render_views

if TYPE_CHECKING:
    from convlora.integrations.eg3d.lab.truth import Truth

MODELS = (PRETRAINED, FULL, LORA)
TRUTHS = {
    "identity distance": "1 − cosine of novel views with the true person from the same cameras; lower is better",
    "view error": "perceptual distance of novel views to the true ones; lower is better",
    "depth error": "of novel views, mean distance from the true surface, the camera being 2.7 away; lower is better",
}
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


def _measures(cohort: Cohort) -> dict[str, Any]:
    """Metrics and claims, those of the truth included where it is known."""
    if not cohort.drawn:
        return {"metrics": METRICS, "claims": claims()}
    text = "LoRA comes closer to the true person than the pretrained generator"
    closer = [Claim(text, metric, LORA.label, PRETRAINED.label, lower_is_better=True) for metric in TRUTHS]
    return {"metrics": METRICS | TRUTHS, "claims": claims() + closer}


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
    results = Results("T1", "Inversion with pivotal tuning (table 1)", **_measures(cohort), paper=paper)
    for subject in cohort.measuring(results, effort):
        seen = _Seen(results, cohort, effort, subject)
        for kind in MODELS:
            found = invert(
                cohort.model(subject, kind), seen.photos, effort.latent_steps, effort.tune_steps, target="all",
                views=seen.cameras, init=cohort.networks.encoder or "mean", lr=cohort.settings.anchor_lr,
                perceptual=cohort.networks.perceptual, seed=subject.seed, progress=cohort.progress,
            )  # fmt: skip
            seen.add(kind, found.images, Views(found.views, found.depths))
        seen.show()
    return results


def figure_12(cohort: Cohort, effort: Effort) -> Results:
    """The photos' projection into the personal space, weights untouched."""
    title = "Inversion without tuning weights (figure 12)"
    results = Results("F12", title, **_measures(cohort))
    results.notes.append("The paper shows pictures of this and no numbers.")
    for subject in cohort.measuring(results, effort):
        seen = _Seen(results, cohort, effort, subject)
        for kind in MODELS:
            model = cohort.model(subject, kind)
            found = project(
                model, seen.photos, cohort.hull(subject), effort.project_steps, per_layer=True,
                perceptual=cohort.networks.perceptual, seed=subject.seed, progress=cohort.progress,
            )  # fmt: skip
            seen.add(kind, found.images, render_views(model, found.ws, seen.cameras))
        seen.show()
    return results


class _Seen:
    """A subject's held-out photos with the truth about them, and what the models made of them."""

    def __init__(self, results: Results, cohort: Cohort, effort: Effort, subject: Subject) -> None:
        self.results, self.cohort, self.subject = results, cohort, subject
        self.photos, self.cameras = cohort.held_out(subject, effort.photos), cohort.views(effort.views)
        self.own, self.turned = [("photo", self.photos.images)], []
        self.truth = cohort.truth(subject, len(self.photos), self.cameras) if cohort.drawn else None
        if self.truth is not None:
            self.turned.append(("the person, turned", self.truth.images[:, 0]))

    def add(self, kind: Kind, images: Tensor, views: Views) -> None:
        """Measure a model's reconstructions (N, 3, R, R) and their novel views."""
        cohort = self.cohort
        values = {
            "perceptual": cohort.perceptual(images, self.photos.images),
            "PSNR": psnr(images, self.photos.images),
            "ID_sim": identity(cohort, self.subject, views.images),
        }
        if self.truth is not None:
            values |= truths(cohort, views, self.truth)
        for metric, found in values.items():
            self.results.add(kind.label, metric, *self.subject.who, by_name(self.photos.names, found))
        self.own.append((kind.label, images))
        self.turned.append((f"{kind.label}, turned", views.images[:, 0]))

    def show(self) -> None:
        self.cohort.show(self.results, self.subject, [*self.own, *self.turned])


def truths(cohort: Cohort, views: Views, truth: Truth) -> dict[str, Tensor]:
    """`TRUTHS` of novel views, each (N,), averaged over V."""
    from convlora.integrations.eg3d.lab.truth import depth_error

    seen, true = views.images.flatten(0, 1), truth.images.flatten(0, 1)
    shape = views.images.shape[:2]
    likeness = torch.nn.functional.cosine_similarity(cohort.embed(seen), cohort.embed(true))
    return {
        "identity distance": 1 - likeness.view(shape).mean(1),
        "view error": cohort.perceptual(seen, true).view(shape).mean(1),
        "depth error": depth_error(views.depths, truth).mean(1),
    }
