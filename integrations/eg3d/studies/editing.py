"""Table 4: attributes changed inside the personal space."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.metrics import id_sim
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, PRETRAINED, Cohort, Kind, Score, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import claims
from convlora.integrations.eg3d.studies.results import Results, by_name
from convlora.integrations.eg3d.tasks import edit_alpha, novel_views, personal_direction, project, synthesize
from convlora.integrations.eg3d.tasks.directions import Direction, find_direction

ATTRIBUTES = ("smile", "age")
STRENGTHS = (-1.0, 1.0)  # times the spread of the personal samples along the direction


def lab_score(images: Tensor, labels: Tensor, attribute: str) -> Tensor:
    """(N,): the lab's own estimate of an attribute of drawn people, roughly in standard deviations."""
    from convlora.integrations.eg3d.lab import networks, world

    column = world.PARAM_NAMES.index(attribute)
    parts = zip(images.split(32), labels.split(32))
    return torch.cat([networks.encode(image, label)[:, column].cpu() for image, label in parts])


def _score(cohort: Cohort) -> Score:
    """Raises ConvloraError where nothing scores attributes."""
    if cohort.score is not None:
        return cohort.score
    if cohort.generator != "lab":
        raise ConvloraError(
            f"T4 needs scores of {' and '.join(ATTRIBUTES)} for pictures of {cohort.generator}: give a function "
            "(images, labels, attribute) -> (N,)"
        )
    return lab_score


def personal_directions(cohort: Cohort, subject: Subject, kind: Kind, effort: Effort) -> dict[str, Direction]:
    """Directions from frontal samples of the person's own space, rendered and scored with this very model."""
    score = _score(cohort)
    labels = cameras.frontal(effort.directions, **cameras.orbit_of(cohort.base.rendering_kwargs))
    made = synthesize(
        cohort.model(subject, kind), cohort.hull(subject), effort.directions, labels=labels, seed=subject.seed,
        progress=cohort.progress,
    )  # fmt: skip
    return {
        name: find_direction(made.w, score(made.images, labels, name), name, share=0.1, seed=subject.seed)
        for name in ATTRIBUTES
    }


def table_4(cohort: Cohort, effort: Effort) -> Results:
    """Held-out photos projected into the personal space, then edited both ways along each attribute."""
    metrics = {
        "ID_sim": "of the edited picture, largest cosine with the person's photos; higher is better",
        "change": "of the edited attribute's score, upwards minus downwards; higher is better",
        "accuracy": "of the direction on held-out samples; higher is better",
    }
    if true := cohort.generator == "lab" and cohort.drawn:
        metrics |= {
            "true change": "of the edited attribute, by the closest drawn change, in standard deviations; "
            "higher is better",
            "purity": "share of the pictures' change that the attribute explains, at most 1; higher is better",
        }
    score = _score(cohort)
    paper = {PRETRAINED.label: {"ID_sim": ".60"}, FULL.label: {"ID_sim": ".76"}, LORA.label: {"ID_sim": ".76"}}
    from convlora.integrations.eg3d.lab.truth import attribute_change

    results = Results("T4", "Semantic editing (table 4)", metrics, claims(), paper)
    for subject in cohort.measuring(results, effort):
        photos = cohort.held_out(subject, effort.photos)
        hull = cohort.hull(subject)
        moments = cohort.moments(subject, len(photos)) if true else None
        shown = [("photo", photos.images)]
        for kind in (PRETRAINED, FULL, LORA):
            model = cohort.model(subject, kind)
            found = project(
                model, photos, hull, effort.project_steps, perceptual=cohort.networks.perceptual, seed=subject.seed,
                progress=cohort.progress,
            )  # fmt: skip
            for name, direction in personal_directions(cohort, subject, kind, effort).items():
                inside = personal_direction(hull, direction.normal)
                spread = (hull.anchors @ (inside.step / inside.step.norm())).std()
                alpha = found.alpha.to(hull.anchors)
                edited = edit_alpha(hull, alpha, inside, torch.tensor(STRENGTHS) * spread.cpu(), exit="project")
                edits = {
                    f"{name} {strength:+g}": novel_views(model, hull.w(a), photos.labels[:, None])[:, 0]
                    for strength, a in zip(STRENGTHS, edited)
                }
                for what, images in edits.items():
                    found_identity = id_sim(cohort.embed(images), subject.reference)
                    results.add(kind.label, "ID_sim", *subject.who, _items(photos, what, found_identity))
                    shown.append((f"{what}, {kind.label}", images))
                down, up = (score(images, photos.labels, name) for images in edits.values())
                results.add(kind.label, "change", *subject.who, _items(photos, name, up - down))
                results.add(kind.label, "accuracy", *subject.who, {name: direction.accuracy})
                if moments is None:
                    continue
                moved = [
                    attribute_change(found.images, images, *moments, photos.labels, name) for images in edits.values()
                ]
                change = moved[1].amount - moved[0].amount
                results.add(kind.label, "true change", *subject.who, _items(photos, name, change))
                for what, one in zip(edits, moved):
                    results.add(kind.label, "purity", *subject.who, _items(photos, what, one.share))
        cohort.show(results, subject, shown)
    return results


def _items(photos: Photos, what: str, values: Tensor) -> dict[str, float]:
    return by_name([f"{photo}, {what}" for photo in photos.names], values)
