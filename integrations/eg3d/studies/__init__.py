"""My3DGen's tables and figures, and those of its companion papers, each one function of a cohort of people."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from convlora.integrations.eg3d.lab.styles import STYLES
from convlora.integrations.eg3d.studies.ablations import table_5, table_6
from convlora.integrations.eg3d.studies.blockwise import STYLE, block_wise, conflicts
from convlora.integrations.eg3d.studies.cohort import Cohort as Cohort
from convlora.integrations.eg3d.studies.decomposition import figure_11
from convlora.integrations.eg3d.studies.editing import table_4
from convlora.integrations.eg3d.studies.effort import Effort as Effort
from convlora.integrations.eg3d.studies.enhancement import table_3
from convlora.integrations.eg3d.studies.failures import occluders
from convlora.integrations.eg3d.studies.instant import from_one_photo
from convlora.integrations.eg3d.studies.inversion import figure_12, table_1
from convlora.integrations.eg3d.studies.pairs import combined
from convlora.integrations.eg3d.studies.para import methods, single_photo
from convlora.integrations.eg3d.studies.ranks import figure_8
from convlora.integrations.eg3d.studies.results import Results as Results
from convlora.integrations.eg3d.studies.synthesis import figure_4, table_2
from convlora.integrations.eg3d.studies.weights import figure_9

Study = Callable[[Cohort, Effort], Results]

STUDIES: dict[str, Study] = {
    "T1": table_1, "T2": table_2, "T3": table_3, "T4": table_4, "T5": table_5, "T6": table_6,
    "F4": figure_4, "F8": figure_8, "F9": figure_9, "F11": figure_11, "F12": figure_12,
    "X1": occluders,
}  # fmt: skip

#: What the companion papers claim, on the same people: HyperDreamBooth, PaRa, Block-wise LoRA.
COMPANIONS: dict[str, Study] = {
    "H1": from_one_photo,
    "B1": block_wise, "B2": conflicts,
    "P1": methods, "P2": single_photo, "P3": combined,
}  # fmt: skip

#: B1 and B2 of the lab's other styles, such as "B1_sketch".
OTHER_STYLES: dict[str, Study] = {
    f"{name}_{style}": partial(study, style=style)
    for name, study in (("B1", block_wise), ("B2", conflicts))
    for style in STYLES
    if style != STYLE
}

ALL = STUDIES | COMPANIONS | OTHER_STYLES
