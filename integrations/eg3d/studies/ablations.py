"""Tables 5 and 6: the rank of the adapter, and the number of photos it learns from."""

from __future__ import annotations

from collections.abc import Sequence

from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.studies.cohort import Cohort, Kind, trainables
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import identity
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.studies.synthesis import interpolated_identity
from convlora.integrations.eg3d.tasks import invert

METRICS = {
    "perceptual": "of the inverted photo, weights frozen; lower is better",
    "PSNR": "dB, of the same; higher is better",
    "ID_sim inversion": "over novel views of the inversion; higher is better",
    "ID_sim interpolation": "along lines between anchors; higher is better",
}


def table_5(cohort: Cohort, effort: Effort) -> Results:
    """Ranks, at the same schedule."""
    kinds = [Kind(rank=rank) for rank in effort.ranks]
    first, last = kinds[0].label, kinds[-1].label
    claims = [
        Claim("a higher rank fits photos better", "perceptual", last, first, lower_is_better=True),
        Claim("rank 1 keeps identity about as well as higher ranks", "ID_sim inversion", first, last, -0.02),
    ]
    paper = {
        Kind(rank=1).label: {"perceptual": "LPIPS .13", "ID_sim inversion": ".60", "ID_sim interpolation": ".62"},
        Kind(rank=4).label: {"perceptual": "LPIPS .11", "ID_sim inversion": ".60", "ID_sim interpolation": ".63"},
        Kind(rank=16).label: {"perceptual": "LPIPS .09", "ID_sim inversion": ".60", "ID_sim interpolation": ".63"},
    }
    results = Results("T5", "Rank of the adapter (table 5)", METRICS, claims, paper)
    _measure(results, cohort, effort, kinds)
    sizes = (f"{kind.label} {trainables(cohort.base, kind):,}" for kind in kinds)
    results.notes.append(f"Trainables: {', '.join(sizes)}.")
    results.notes.append("The paper's rank 1 is rank 3 on 3×3 layers: 0.2, 0.9 and 3.5 million trainables.")
    return results


def table_6(cohort: Cohort, effort: Effort) -> Results:
    """Nested random subsets of a person's photos."""
    kinds = [Kind(photos=size) for size in effort.sizes]
    few, usual, many = kinds[0], kinds[-2], kinds[-1]
    metric = "ID_sim interpolation"
    claims = [
        Claim(f"{usual.photos} photos are better than {few.photos}", metric, usual.label, few.label),
        Claim(f"{usual.photos} photos are about as good as {many.photos}", metric, usual.label, many.label, -0.02),
    ]
    known = {10: ".618", 50: ".628", 100: ".629"}
    paper = {k.label: {"ID_sim interpolation": known[k.photos]} for k in kinds if k.photos in known}
    results = Results("T6", "Number of photos (table 6)", METRICS, claims, paper)
    _measure(results, cohort, effort, kinds)
    return results


def _measure(results: Results, cohort: Cohort, effort: Effort, kinds: Sequence[Kind]) -> None:
    for subject in cohort.measuring(results, effort):
        photos = cohort.held_out(subject, effort.photos)
        for kind in kinds:
            found = invert(
                cohort.model(subject, kind), photos, effort.latent_steps, 0, target="none",
                views=cohort.views(effort.views), init=cohort.networks.encoder or "mean", lr=cohort.settings.anchor_lr,
                perceptual=cohort.networks.perceptual, seed=subject.seed, progress=cohort.progress,
            )  # fmt: skip
            names = photos.names
            results.add(
                kind.label, "perceptual", *subject.who, by_name(names, cohort.perceptual(found.images, photos.images))
            )
            results.add(kind.label, "PSNR", *subject.who, by_name(names, psnr(found.images, photos.images)))
            results.add(
                kind.label, "ID_sim inversion", *subject.who, by_name(names, identity(cohort, subject, found.views))
            )
            lines = interpolated_identity(cohort, subject, kind, effort)
            results.add(kind.label, "ID_sim interpolation", *subject.who, lines)
