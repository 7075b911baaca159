"""HyperDreamBooth (https://arxiv.org/abs/2307.06949) on people: one photo, a prediction and forty steps."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.fingerprint import fingerprint
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.hyper.instant import instant
from convlora.integrations.eg3d.hyper.network import HyperNetwork
from convlora.integrations.eg3d.hyper.opening import open_hypernetwork
from convlora.integrations.eg3d.metrics import id_sim, psnr
from convlora.integrations.eg3d.studies.cohort import PRETRAINED, Cohort, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import METRICS, TRUTHS, truths
from convlora.integrations.eg3d.studies.results import Claim, Results
from convlora.integrations.eg3d.tasks.views import Views, render_views

RANK = 4
MARKS = (100, 200, 400)  # steps of the long tuning at which it is measured too: one photo may be learnt too well
HYPERNETWORK = "hypernetwork.safetensors"  # in the cohort's folder: for other generators than the lab's


class _Way(NamedTuple):
    """How a person is made from one photo."""

    predicted: bool
    steps: int
    refinements: int | None = None


def ways(fast: int, slow: int) -> dict[str, _Way]:
    """By label: the method, its ablations, and what it is compared with."""
    return {
        f"hypernetwork + {fast} steps": _Way(True, fast),
        f"one refinement + {fast} steps": _Way(True, fast, 1),
        "hypernetwork only": _Way(True, 0),
        f"LoRA rank {RANK}, {fast} steps": _Way(False, fast),
        f"LoRA rank {RANK}, {slow} steps": _Way(False, slow),
    }


def from_one_photo(cohort: Cohort, effort: Effort, fast: int = 40, slow: int = 1000) -> Results:
    """Each person's first photo against all others: the method after `fast` steps, a plain LoRA after `slow`.

    All start from one inversion. The long tuning is measured at `MARKS` on its way too. The hypernetwork is the lab's,
    or the file `hypernetwork.safetensors` in the cohort's folder.

    Raises:
        ConvloraError, FileError: there is no hypernetwork for this generator.
    """
    hyper, results = _hypernetwork(cohort), Results("H1", "A person from one photo (HyperDreamBooth)", _metrics(cohort))
    results.facts = {"hypernetwork": fingerprint(hyper), "fast": fast, "slow": slow}
    best, once, alone, without, plain = ways(fast, slow)
    results.claims = _claims(cohort, best, once, alone, without, plain)
    if slow > MARKS[0]:
        early = f"{plain}, after {MARKS[0]}"
        results.claims += [
            Claim(f"prediction and a few steps are about as good as {MARKS[0]} of a long tuning", "ID_sim", best, early,
                  -0.02),
            Claim(f"a long tuning keeps identity better at its end than after {MARKS[0]} steps", "ID_sim", plain,
                  early),
        ]  # fmt: skip
    results.paper = {
        label: {"ID_sim": f"Face Rec. {value}"}
        for label, value in ((best, ".655"), (once, ".648"), (alone, ".631"), (without, ".647"), (plain, ".618"))
    }
    results.notes.append(
        "The paper's Face Rec. are of Stable Diffusion and of another recogniser: their order can be compared, the "
        "numbers cannot. Its last row is DreamBooth."
    )
    for subject in cohort.measuring(results, effort):
        photo, index = _photo(cohort, subject)
        settings = cohort.settings
        anchors = find_anchors(
            cohort.base, photo, settings.anchor_steps, init=cohort.networks.encoder or "mean", lr=settings.anchor_lr,
            perceptual=cohort.networks.perceptual, seed=subject.seed, progress=cohort.progress,
        )  # fmt: skip
        judge = _Judge(cohort, subject, photo, index, effort)
        judge.add(results, PRETRAINED.label, cohort.base, anchors)
        for label, way in ways(fast, slow).items():
            model = copy.deepcopy(cohort.base)
            look = partial(judge.on_the_way, results, label, model, anchors) if way.steps == slow else None
            measuring = judge.seconds
            done = instant(
                model, photo, hyper if way.predicted else None, anchors=anchors, steps=way.steps, rank=RANK,
                lr=settings.lr, refinements=way.refinements, perceptual=cohort.networks.perceptual, seed=subject.seed,
                progress=cohort.progress, look=look, look_every=MARKS[0],
            )  # fmt: skip
            spent = sum(seconds for stage, seconds in done.seconds.items() if stage != "inversion")
            judge.add(results, label, model, anchors, spent - (judge.seconds - measuring))
        cohort.show(results, subject, judge.shown)
    return results


def _metrics(cohort: Cohort) -> dict[str, str]:
    return {
        **METRICS, **(TRUTHS if cohort.drawn else {}),
        "seconds": "of prediction and tuning, after the inversion that all share; lower is better",
    }  # fmt: skip


def _claims(cohort: Cohort, best: str, once: str, alone: str, without: str, plain: str) -> list[Claim]:
    metric = "ID_sim"
    claims = [
        Claim("prediction and a few steps are about as good as a long tuning", metric, best, plain, -0.02),
        Claim("prediction alone keeps identity better than the pretrained generator", metric, alone, PRETRAINED.label),
        Claim("the prediction helps", metric, best, without),
        Claim("the tuning helps", metric, best, alone),
        Claim("predicting in several rounds helps", metric, best, once),
        Claim("it is faster than a long tuning", "seconds", best, plain, lower_is_better=True),
    ]
    if cohort.drawn:
        truth = "identity distance"
        claims += [
            Claim("prediction alone comes closer to the true person", truth, alone, PRETRAINED.label, 0.0, True),
            Claim("the true person is about as close as after a long tuning", truth, best, plain, -0.02, True),
        ]
    return claims


def _hypernetwork(cohort: Cohort) -> HyperNetwork:
    path = cohort.out / HYPERNETWORK
    if path.is_file():
        return open_hypernetwork(path, cohort.device)
    if cohort.generator != "lab":
        raise ConvloraError(
            f"H1 needs a hypernetwork for {cohort.generator} at {path}: `convlora eg3d hypernetwork` trains one"
        )
    return open_hypernetwork("lab", cohort.device)


def _photo(cohort: Cohort, subject: Subject) -> tuple[Photos, int]:
    """The one photo, another for every seed, and its place among the person's."""
    name = cohort.album(subject).names[0]
    index = subject.train.names.index(name)
    return subject.train.part([index]), index


class _Judge:
    """What is known of a person beside the one photo, and what the models made of it."""

    def __init__(self, cohort: Cohort, subject: Subject, photo: Photos, index: int, effort: Effort) -> None:
        self.cohort, self.subject, self.photo = cohort, subject, photo
        self.cameras = cohort.views(effort.views)
        others = torch.arange(len(subject.reference)) != index
        self.reference = torch.cat([subject.reference[others], cohort.embed(subject.test.images)])
        self.truth = None
        self.seconds = 0.0  # spent on measuring
        self.shown: list[tuple[str, Tensor]] = [("the one photo", photo.images)]
        if cohort.drawn:
            from convlora.integrations.eg3d.lab import people
            from convlora.integrations.eg3d.lab.truth import true_views

            assert subject.drawn is not None
            moment = people.photos(subject.drawn, "train", index + 1, 16)
            side = cohort.base.img_resolution, cohort.base.neural_rendering_resolution
            params, traits = moment.params[index:], moment.traits[index:]
            self.truth = true_views(params, traits, self.cameras.cpu(), *side, cohort.species)
            self.shown.append(("the person, turned", self.truth.images[0]))

    def on_the_way(self, results: Results, label: str, model: TriPlaneGenerator, anchors: Anchors, step: int) -> None:
        """Measure a model while it is tuned, if a mark is reached."""
        if step in MARKS and step < results.facts["slow"]:
            self.add(results, f"{label}, after {step}", model, anchors)

    def add(
        self, results: Results, label: str, model: TriPlaneGenerator, anchors: Anchors, seconds: float | None = None
    ) -> None:
        """Measure a model's picture of the photo, and its novel views."""
        began = time.monotonic()
        labels = self.photo.labels if anchors.labels is None else anchors.labels
        found = render_views(model, anchors.w, torch.cat([labels[:, None], self.cameras[None].to(labels)], 1))
        own, views = found.images[:, 0], Views(found.images[:, 1:], found.depths[:, 1:])
        values: dict[str, Any] = {
            "perceptual": self.cohort.perceptual(own, self.photo.images),
            "PSNR": psnr(own, self.photo.images),
            "ID_sim": id_sim(self.cohort.embed(views.images[0]), self.reference).mean()[None],
        }
        if self.truth is not None:
            values |= truths(self.cohort, views, self.truth)
        if seconds is not None:
            values["seconds"] = torch.tensor([seconds])
        for metric, value in values.items():
            results.add(label, metric, *self.subject.who, {self.photo.names[0]: float(value)})
        self.shown.append((label, torch.cat([own, views.images[0]])))
        self.seconds += time.monotonic() - began
