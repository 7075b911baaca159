"""Figure 11: how a convolution's ΔW is factored, and the patterns that a wrong layout prints into faces."""

from __future__ import annotations

from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.metrics.checkerboard import checkerboard
from convlora.integrations.eg3d.studies.cohort import LORA, Cohort, Kind, trainables
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import novel_views

WRONG = Kind("loralib_view")
LARGER = Kind(numbers_of=WRONG.method)
KINDS = (LORA, LARGER, Kind("tucker"), Kind("separable"), WRONG)
_SHOWN = 6


def figure_11(cohort: Cohort, effort: Effort) -> Results:
    """Every training photo rendered from its anchor by adapters in four layouts, at equal rank and equal size."""
    metrics = {
        "checkerboard": "share of the error's fast energy at half and a quarter of Nyquist; lower is better",
        "perceptual": "distance of a training photo to its anchor's rendering; lower is better",
        "PSNR": "dB, of the same; higher is better",
    }
    claims = [
        Claim(f"im2col {text} loralib's layout, at equal {size}", metric, kind.label, WRONG.label, lower_is_better=True)
        for size, kind in (("rank", LORA), ("size", LARGER))
        for text, metric in (("prints less of a checkerboard than", "checkerboard"), ("fits better than", "perceptual"))
    ]
    results = Results("F11", "Layouts of ΔW (figure 11)", metrics, claims)
    for subject in cohort.measuring(results, effort):
        photos, anchors = cohort.album(subject), cohort.anchors(subject)
        shown = [("photo", photos.images[:_SHOWN])]
        for kind in KINDS:
            images = novel_views(cohort.model(subject, kind), anchors.w, photos.labels[:, None])[:, 0]
            names = photos.names
            results.add(kind.label, "checkerboard", *subject.who, by_name(names, checkerboard(images, photos.images)))
            results.add(
                kind.label, "perceptual", *subject.who, by_name(names, cohort.perceptual(images, photos.images))
            )
            results.add(kind.label, "PSNR", *subject.who, by_name(names, psnr(images, photos.images)))
            shown.append((kind.label, images[:_SHOWN]))
        cohort.show(results, subject, shown)
    results.notes.append(
        "Trainables: " + ", ".join(f"{kind.label} {trainables(cohort.base, kind):,}" for kind in KINDS) + "."
    )
    return results
