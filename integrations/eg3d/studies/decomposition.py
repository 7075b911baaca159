"""Figure 11: how a convolution's ΔW is factored, and the patterns that a wrong layout prints into faces."""

from __future__ import annotations

from convlora.integrations.eg3d.metrics import psnr
from convlora.integrations.eg3d.metrics.checkerboard import checkerboard
from convlora.integrations.eg3d.studies.cohort import LORA, Cohort, Kind
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import novel_views

KINDS = (LORA, Kind("tucker"), Kind("separable"), Kind("loralib_view"))


def figure_11(cohort: Cohort, effort: Effort) -> Results:
    """Every training photo rendered from its anchor by adapters of equal rank, in four layouts."""
    metrics = {
        "checkerboard": "share of the error's fast energy at half and a quarter of Nyquist; lower is better",
        "perceptual": "distance of a training photo to its anchor's rendering; lower is better",
        "PSNR": "dB, of the same; higher is better",
    }
    wrong = KINDS[-1].label
    claims = [
        Claim("im2col prints less of a checkerboard than loralib's layout", "checkerboard", LORA.label, wrong,
              lower_is_better=True),
        Claim("im2col fits better than loralib's layout", "perceptual", LORA.label, wrong, lower_is_better=True),
    ]  # fmt: skip
    results = Results("F11", "Layouts of ΔW (figure 11)", metrics, claims)
    for subject in cohort.subjects():
        photos, anchors = cohort.album(subject), cohort.anchors(subject)
        for kind in KINDS:
            images = novel_views(cohort.model(subject, kind), anchors.w, photos.labels[:, None])[:, 0]
            who, names = (subject.person.name, subject.seed), photos.names
            results.add(kind.label, "checkerboard", *who, by_name(names, checkerboard(images, photos.images)))
            results.add(kind.label, "perceptual", *who, by_name(names, cohort.perceptual(images, photos.images)))
            results.add(kind.label, "PSNR", *who, by_name(names, psnr(images, photos.images)))
    results.notes.append("The same rank is not the same number of parameters: see docs/methods.md for both on EG3D.")
    return results
