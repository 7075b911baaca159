"""Table 3: holes filled and lost resolution restored, from the person's own space."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from convlora.integrations.eg3d.metrics import id_sim, psnr
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, PRETRAINED, Cohort
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import claims
from convlora.integrations.eg3d.studies.results import Results, by_name
from convlora.integrations.eg3d.tasks import inpaint, upscale
from convlora.integrations.eg3d.tasks.degrade import center_hole, downsample


def table_3(cohort: Cohort, effort: Effort) -> Results:
    """Held-out photos with a hole in the face, and reduced by `factor`, brought back by each model."""
    metrics = {
        "inpainting ID_sim": "largest cosine with the person's photos; higher is better",
        "upscaling ID_sim": "the same; higher is better",
        "inpainting PSNR": "dB against the photo, inside the hole; higher is better",
        "upscaling PSNR": "dB against the photo; higher is better",
    }
    paper = {
        PRETRAINED.label: {"inpainting ID_sim": ".62", "upscaling ID_sim": ".61"},
        FULL.label: {"inpainting ID_sim": ".72", "upscaling ID_sim": ".73"},
        LORA.label: {"inpainting ID_sim": ".72", "upscaling ID_sim": ".73"},
    }
    both = [claim for task in ("inpainting", "upscaling") for claim in claims(f"{task} ID_sim")]
    results = Results("T3", "Enhancement: inpainting and super-resolution (table 3)", metrics, both, paper)
    for subject in cohort.measuring(results, effort):
        photos = cohort.held_out(subject, effort.photos)
        known, hull = center_hole(photos.images.shape[-1]), cohort.hull(subject)
        small = replace(photos, images=downsample(photos.images, effort.factor))
        perceptual = cohort.networks.perceptual
        shown = [("photo", photos.images), ("hole", photos.images * known)]
        shown.append((f"1/{effort.factor} the size", F.interpolate(small.images, photos.images.shape[-1])))
        options: dict[str, Any] = {
            "per_layer": True,
            "perceptual": perceptual,
            "seed": subject.seed,
            "progress": cohort.progress,
        }
        for kind in (PRETRAINED, FULL, LORA):
            model = cohort.model(subject, kind)
            filled = inpaint(model, photos, hull, known, effort.project_steps, **options)
            hole = (1 - known).expand(len(photos), -1, -1, -1)
            larger = upscale(model, small, hull, effort.project_steps, **options)
            shown += [(f"filled, {kind.label}", filled.images), (f"enlarged, {kind.label}", larger.images)]
            for task, images, seen in (("inpainting", filled.images, hole), ("upscaling", larger.images, None)):
                scores = id_sim(cohort.embed(images), subject.reference)
                results.add(kind.label, f"{task} ID_sim", *subject.who, by_name(photos.names, scores))
                results.add(
                    kind.label, f"{task} PSNR", *subject.who, by_name(photos.names, psnr(images, photos.images, seen))
                )
        cohort.show(results, subject, shown)
    return results
