"""Failure cases: what covers a face is taken for part of it."""

from __future__ import annotations

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, PRETRAINED, Cohort
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import identity
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import novel_views, project

COVER, COVERED = "glasses", "with glasses"


def occluders(cohort: Cohort, effort: Effort) -> Results:
    """Held-out photos with and without glasses, projected into the personal space: is it still the person?"""
    if not cohort.drawn or COVER not in cohort.species.occluder_traits:
        raise ConvloraError("X1 compares drawn people with and without glasses; these photographs have no such twins")
    from convlora.integrations.eg3d.lab import people, world

    metrics = {"ID_sim": "over novel views of the projection; higher is better"}
    claims = [Claim("covering the eyes costs identity", "ID_sim", LORA.label, f"{LORA.label}, {COVERED}")]
    results = Results("X1", "Failure cases: occluders", metrics, claims)
    results.notes.append("The paper shows such failures and gives no numbers.")
    glasses = world.TRAIT_NAMES.index(COVER)
    for subject in cohort.measuring(results, effort):
        count = len(cohort.held_out(subject, effort.photos))
        assert subject.drawn is not None
        drawn = people.photos(subject.drawn, "test", count, cohort.base.img_resolution)
        traits = drawn.traits.clone()
        traits[:, glasses] = 1.0
        cam2world, _ = cameras.split_label(drawn.labels)
        covered = world.render(drawn.params, traits, cam2world, None, cohort.base.img_resolution).image
        names = subject.test.names[:count]
        shown = [("photo", drawn.images), (COVERED, covered)]
        for kind in (PRETRAINED, FULL, LORA):
            model = cohort.model(subject, kind)
            for label, images in ((kind.label, drawn.images), (f"{kind.label}, {COVERED}", covered)):
                found = project(
                    model, Photos(images, drawn.labels, names), cohort.hull(subject), effort.project_steps,
                    perceptual=cohort.networks.perceptual, seed=subject.seed, progress=cohort.progress,
                )  # fmt: skip
                views = novel_views(model, found.ws, cohort.views(effort.views))
                shown.append((label, found.images))
                results.add(label, "ID_sim", *subject.who, by_name(names, identity(cohort, subject, views)))
        cohort.show(results, subject, shown)
    return results
