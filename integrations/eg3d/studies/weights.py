"""Figure 9: which blocks a person's adapter changes most."""

from __future__ import annotations

import convlora
from convlora.integrations.eg3d.studies.cohort import LORA, Cohort
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Claim, Results


def figure_9(cohort: Cohort, effort: Effort) -> Results:
    """‖ΔW‖/‖W₀‖ of every block in percent, in effective units, over people."""
    resolutions = cohort.base.backbone.synthesis.block_resolutions
    middle = [f"b{r}" for r in resolutions if 8 <= r <= 32]
    outer = [f"b{r}" for r in resolutions if not 8 <= r <= 32]
    claims = [
        Claim("blocks 8 to 32 change more than the others of the backbone", "change", "mean of " + ", ".join(middle),
              "mean of " + ", ".join(outer)),
    ]  # fmt: skip
    metrics = {"change": "‖ΔW‖/‖W₀‖ in percent, Frobenius norms in effective units"}
    results = Results("F9", "Weight change by block (figure 9)", metrics, claims)
    for subject in cohort.measuring(results, effort):
        model = cohort.model(subject, LORA)
        rows = convlora.weight_change(convlora.Adapter.of(model), by="block")
        change = {row.name.rpartition(".")[2] if "synthesis" in row.name else row.name: 100 * row.ratio for row in rows}
        for block, value in change.items():
            results.add(block, "change", *subject.who, {"all": value})
        for group in (middle, outer):
            mean = sum(change[block] for block in group) / len(group)
            results.add("mean of " + ", ".join(group), "change", *subject.who, {"all": mean})
    return results
