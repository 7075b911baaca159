"""Figure 9: which blocks a person's model changes most."""

from __future__ import annotations

import copy

import convlora
from convlora.integrations.eg3d.personalize import TARGETS
from convlora.integrations.eg3d.studies.cohort import FULL, LORA, Cohort, Kind
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results

PAPERS = Kind(preset="paper")  # ΔW in absolute units; ours is scaled relative to each weight
KINDS = (LORA, PAPERS, FULL)


def figure_9(cohort: Cohort, effort: Effort) -> Results:
    """‖ΔW‖/‖W₀‖ of every block in percent, in effective units, over people."""
    resolutions = cohort.base.backbone.synthesis.block_resolutions
    groups = {
        "blocks 8 to 32": [f"b{r}" for r in resolutions if 8 <= r <= 32],
        "the backbone's other blocks": [f"b{r}" for r in resolutions if not 8 <= r <= 32],
    }
    middle, outer = groups
    claims = [
        Claim(
            f"coarse and middle blocks change most, {kind.label}",
            "change",
            f"{middle}, {kind.label}",
            f"{outer}, {kind.label}",
        )
        for kind in KINDS
    ]
    metrics = {"change": "‖ΔW‖/‖W₀‖ in percent, Frobenius norms in effective units"}
    results = Results("F9", "Weight change by block (figure 9)", metrics, claims)
    for subject in cohort.measuring(results, effort):
        for kind in KINDS:
            if kind == FULL:  # the difference of the weights, as an adapter of full rank
                adapter = convlora.extract(
                    cohort.model(subject, kind), copy.deepcopy(cohort.base), energy=1.0, targets=list(TARGETS)
                )
            else:
                adapter = convlora.Adapter.of(cohort.model(subject, kind))
            rows = convlora.weight_change(adapter, by="block")
            change = {row.name.removeprefix("backbone.synthesis."): 100 * row.ratio for row in rows}
            for block, value in change.items():
                results.add(f"{block}, {kind.label}", "change", *subject.who, {"all": value})
            for group, blocks in groups.items():
                mean = sum(change[block] for block in blocks) / len(blocks)
                results.add(f"{group}, {kind.label}", "change", *subject.who, {"all": mean})
    results.notes.append("Tensors trained in full beside an adapter, here the decoder, are not counted.")
    return results
