"""Table 2 and figure 4: new appearances of a person, and the lines between the anchors."""

from __future__ import annotations

import torch

from convlora.integrations.eg3d.metrics import diversity, id_sim
from convlora.integrations.eg3d.metrics.loading import PerceptualDistance
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, PRETRAINED, Cohort, Kind, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import claims, identity
from convlora.integrations.eg3d.studies.results import Results, by_name
from convlora.integrations.eg3d.tasks import interpolate, synthesize

MODELS = (PRETRAINED, FULL, LORA)
_SHOWN = 8  # pictures in a row of the page


def table_2(cohort: Cohort, effort: Effort) -> Results:
    """Random points between anchors from random cameras: are they the person, and do they differ?"""
    paper = {
        PRETRAINED.label: {"ID_sim": ".53", "diversity": ".19"},
        FULL.label: {"ID_sim": ".62", "diversity": ".21"},
        LORA.label: {"ID_sim": ".62", "diversity": ".21"},
    }
    metrics = {
        "ID_sim": "largest cosine with the person's photos; higher is better",
        "diversity": "perceptual distance within clusters around the photos (Ojha et al.), mean",
        "diversity_std": "the same, standard deviation over clusters",
    }
    results = Results("T2", "Synthesis (table 2)", metrics, claims(), paper)
    perceptual = cohort.networks.perceptual
    for subject in cohort.measuring(results, effort):
        album, hull = cohort.album(subject), cohort.hull(subject, dilation=1.0)
        shown = [("photos", album.images[:_SHOWN])]
        for kind in MODELS:
            made = synthesize(
                cohort.model(subject, kind), hull, effort.samples, seed=subject.seed, progress=cohort.progress
            )
            scores = id_sim(cohort.embed(made.images), subject.reference)
            results.add(kind.label, "ID_sim", *subject.who, by_name(map(str, range(effort.samples)), scores))
            assert isinstance(perceptual, PerceptualDistance)
            found = diversity(made.images, album.images, perceptual, seed=subject.seed)
            results.add(kind.label, "diversity", *subject.who, {"all": found.mean})
            results.add(kind.label, "diversity_std", *subject.who, {"all": found.std})
            shown.append((kind.label, made.images[:_SHOWN]))
        cohort.show(results, subject, shown)
    results.notes.append(
        "The paper calls its numbers the standard deviation of pairwise LPIPS; they read like its mean. Both are given."
    )
    return results


def interpolated_identity(cohort: Cohort, subject: Subject, kind: Kind, effort: Effort) -> dict[str, float]:
    """ID_sim over novel views at every point of lines between random anchors: {"pair 0, weight 0.25": score}."""
    model, anchors = cohort.model(subject, kind), cohort.anchors(subject, kind.photos)
    generator = torch.Generator().manual_seed(subject.seed)
    views, found = cohort.views(effort.views), {}
    for pair in range(effort.pairs):
        a, b = torch.randperm(len(anchors.w), generator=generator)[:2].tolist()
        images = interpolate(model, anchors.w[a], anchors.w[b], views, weights=effort.weights)
        scores = identity(cohort, subject, images)
        for theta, score in zip(torch.linspace(0, 1, effort.weights).tolist(), scores.tolist()):
            found[f"pair {pair}, weight {theta:.2f}"] = score
    return found


def figure_4(cohort: Cohort, effort: Effort) -> Results:
    """Identity along the line between two anchors."""
    metrics = {"ID_sim": "over novel views at every point of the line; higher is better"}
    results = Results("F4", "Interpolation (figure 4)", metrics, claims(), axis="weight")
    for subject in cohort.measuring(results, effort):
        for kind in MODELS:
            scores = interpolated_identity(cohort, subject, kind, effort)
            results.add(kind.label, "ID_sim", *subject.who, scores)
    return results
