"""Table 1 and figure 12: unseen photos inverted with and without tuning the weights to them."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.integrations.eg3d.metrics import id_sim, psnr
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, PRETRAINED, Cohort, Kind, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import invert, project
from convlora.integrations.eg3d.tasks.views import Views, render_views

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
    **TRUTHS,
}


def claims(metric: str = "ID_sim", margin: float = 0.02) -> list[Claim]:
    """What the paper says in tables 1 to 4 of identity."""
    return [
        Claim("LoRA keeps identity better than the pretrained generator", metric, LORA.label, PRETRAINED.label),
        Claim("LoRA is about as good as full fine-tuning", metric, LORA.label, FULL.label, -margin),
    ]


def true_claims() -> list[Claim]:
    """The paper's first claim, of the truths that only a drawn world knows."""
    text = "LoRA comes closer to the true person than the pretrained generator"
    return [Claim(text, metric, LORA.label, PRETRAINED.label, lower_is_better=True) for metric in TRUTHS]


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
    results = Results("T1", "Inversion with pivotal tuning (table 1)", METRICS, claims() + true_claims(), paper)
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
    results = Results("F12", title, METRICS, claims() + true_claims())
    results.notes.append("The paper shows pictures of this and no numbers.")
    for subject in cohort.measuring(results, effort):
        seen = _Seen(results, cohort, effort, subject)
        for kind in MODELS:
            model = cohort.model(subject, kind)
            torch.manual_seed(subject.seed)
            found = project(
                model, seen.photos, cohort.hull(subject), effort.project_steps, per_layer=True,
                perceptual=cohort.networks.perceptual, progress=cohort.progress,
            )  # fmt: skip
            seen.add(kind, found.images, render_views(model, found.ws, seen.cameras))
        seen.show()
    return results


class _Seen:
    """A subject's held-out photos with the truth about them, and what the models made of them."""

    def __init__(self, results: Results, cohort: Cohort, effort: Effort, subject: Subject) -> None:
        self.results, self.cohort, self.subject = results, cohort, subject
        self.photos, self.cameras = cohort.held_out(subject, effort.photos), cohort.views(effort.views)
        self.truth = cohort.truth(subject, len(self.photos), self.cameras)
        self.own = [("photo", self.photos.images)]
        self.turned = [("the person", self.truth.images[:, 0])]

    def add(self, kind: Kind, images: Tensor, views: Views) -> None:
        """Measure a model's reconstructions (N, 3, R, R) and their novel views."""
        from convlora.integrations.eg3d.lab.truth import depth_error

        cohort, truth = self.cohort, self.truth
        values = {
            "perceptual": cohort.perceptual(images, self.photos.images),
            "PSNR": psnr(images, self.photos.images),
            "ID_sim": identity(cohort, self.subject, views.images),
            "identity distance": _identity_distance(cohort, views.images, truth.images),
            "view error": cohort.perceptual(views.images.flatten(0, 1), truth.images.flatten(0, 1))
            .view(views.images.shape[:2])
            .mean(1),
            "depth error": depth_error(views.depths, truth).mean(1),
        }
        for metric, found in values.items():
            self.results.add(kind.label, metric, *self.subject.who, by_name(self.photos.names, found))
        self.own.append((kind.label, images))
        self.turned.append((kind.label, views.images[:, 0]))

    def show(self) -> None:
        self.cohort.show(self.results, self.subject, [*self.own, *self.turned])


def _identity_distance(cohort: Cohort, views: Tensor, true: Tensor) -> Tensor:
    """(N,): of views (N, V, 3, R, R), averaged over V."""
    a, b = (cohort.embed(images.flatten(0, 1)) for images in (views, true))
    return 1 - torch.nn.functional.cosine_similarity(a, b).view(views.shape[:2]).mean(1)
