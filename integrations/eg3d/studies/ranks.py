"""Figure 8: what a higher rank buys, in the head and behind it."""

from __future__ import annotations

from torch import Tensor

from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.studies.cohort import FULL, Cohort, Kind, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import novel_views

_SHOWN = 6


def figure_8(cohort: Cohort, effort: Effort) -> Results:
    """Every training photo rendered from its anchor at several ranks, judged inside and outside the head."""
    kinds = [*(Kind(rank=rank) for rank in effort.ranks), FULL]
    ends = f"gain of rank {effort.ranks[-1]} over {effort.ranks[0]}"
    behind, within = f"{ends}, background", f"{ends}, head"
    metrics = {"PSNR": "dB of a training photo rendered from its anchor; higher is better"}
    claims = []
    if cohort.drawn:
        metrics |= {
            "PSNR head": "the same over the drawn head; higher is better",
            "PSNR background": "the same outside it; higher is better",
            "gain": "dB that the highest rank adds to the lowest's",
        }
        claims.append(Claim("rank buys more in the background than in the head", "gain", behind, within))
    results = Results("F8", "What rank buys (figure 8)", metrics, claims)
    for subject in cohort.measuring(results, effort):
        photos, anchors = cohort.album(subject), cohort.anchors(subject)
        masks: dict[str, Tensor | None] = {"PSNR": None}
        if cohort.drawn:
            head = _heads(cohort, subject, photos)
            masks |= {"PSNR head": head, "PSNR background": 1 - head}
        shown, found = [("photo", photos.images[:_SHOWN])], {}
        for kind in kinds:
            images = novel_views(cohort.model(subject, kind), anchors.w, photos.labels[:, None])[:, 0]
            for metric, mask in masks.items():
                found[kind, metric] = psnr(images, photos.images, mask)
                results.add(kind.label, metric, *subject.who, by_name(photos.names, found[kind, metric]))
            shown.append((kind.label, images[:_SHOWN]))
        for label, metric in ((behind, "PSNR background"), (within, "PSNR head")) if cohort.drawn else ():
            gain = found[kinds[-2], metric] - found[kinds[0], metric]
            results.add(label, "gain", *subject.who, by_name(photos.names, gain))
        cohort.show(results, subject, shown)
    results.notes.append("The paper shows pictures of this and no numbers.")
    return results


def _heads(cohort: Cohort, subject: Subject, photos: Photos) -> Tensor:
    """(N, 1, R, R): where the head is in drawn training photos."""
    from convlora.integrations.eg3d.lab import people

    assert subject.drawn is not None
    masks = people.photos(subject.drawn, "train", cohort.largest, cohort.base.img_resolution).mask
    return masks[[subject.train.names.index(name) for name in photos.names]]
