"""A person's adapter and a style's as one: over which groups of blocks each counts, and the generator they are on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import convlora
from convlora import Adapter
from convlora.integrations.eg3d.blocks import (
    FULL_MASK,
    GROUPS,
    Mask,
    mask_name,
    masked_weights,
    masks,
    rest,
)
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.studies.cohort import LORA, Cohort, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.styles import Styles, both
from convlora.integrations.eg3d.tasks import novel_views

#: Where a person's block-wise adapter is trained: blocks 8 to 32 are the identity's by My3DGen's figure 9.
IDENTITY_BLOCKS: Mask = ("coarse", "middle")


class Mix(NamedTuple):
    """Groups of blocks in which the person's adapter counts, and the style's; `…_trained`: that were trained so."""

    identity: Mask
    style: Mask
    identity_trained: bool = False
    style_trained: bool = False
    how: str = "concat"

    @property
    def label(self) -> str:
        one = mask_name(self.identity) + self.identity_trained * " trained so"
        other = mask_name(self.style) + self.style_trained * " trained so"
        return f"identity {one}, style {other}" + ("" if self.how == "concat" else f", {self.how.replace('_', ' ')}")


BOTH_FULL = Mix(FULL_MASK, FULL_MASK)


def mixes(chosen: Iterable[Mask]) -> list[Mix]:
    """All that B1 measures, `chosen` being the masks that styles were also trained with."""
    chosen = list(chosen)
    found = [Mix(FULL_MASK, mask) for mask in masks()]
    found += [Mix(FULL_MASK, mask, style_trained=True) for mask in chosen]
    found += [Mix(rest(mask), mask) for mask in masks() if 0 < len(mask) < len(GROUPS)]
    found += [Mix(IDENTITY_BLOCKS, FULL_MASK), Mix(IDENTITY_BLOCKS, FULL_MASK, True)]
    found += [Mix(IDENTITY_BLOCKS, mask, True, True) for mask in chosen]
    return [*found, BOTH_FULL._replace(how="null_space")]


def loaded(cohort: Cohort, subject: Subject, styles: Styles, chosen: Iterable[Mask]) -> TriPlaneGenerator:
    """The person's model with all else that mixtures are made of on it, everything disabled.

    `chosen` are the style's masks that were trained; with none of them the identity's is left away too.
    """
    chosen = list(chosen)
    G = cohort.model(subject, LORA)
    Adapter.of(G, source("identity", FULL_MASK)).disable()
    files = {source("style", mask): styles.adapter(mask) for mask in (FULL_MASK, *chosen)}
    if chosen:
        files[source("identity", IDENTITY_BLOCKS)] = cohort.file(subject, LORA._replace(blocks=IDENTITY_BLOCKS))
    for name, file in files.items():
        convlora.load_adapter(G, file, name).disable()
    return G.requires_grad_(False)


def mixed(G: TriPlaneGenerator, mix: Mix, name: str = "mix") -> Adapter:
    """The mixture as one more adapter on a `loaded` generator, whose other adapters stay disabled."""
    weights: dict[str, float | Mapping[str, float]] = {}
    if mix.identity:
        weights |= _weights(G, "identity", mix.identity, mix.identity_trained)
    if mix.style:
        weights |= _weights(G, "style", mix.style, mix.style_trained)
    how: Any = mix.how
    return convlora.compose(G, weights, how=how, name=name)


def views(G: TriPlaneGenerator, mix: Mix, cohort: Cohort, subject: Subject, effort: Effort) -> Tensor:
    """(N, V, 3, R, R): novel views of the person's anchors by a mixture."""
    mix_on = mixed(G, mix)
    try:
        return novel_views(G, *cameras(cohort, subject, effort))
    finally:
        mix_on.remove()


def save_mix(G: TriPlaneGenerator, mix: Mix, path: Path) -> Path:
    """A mixture as one adapter file of the base."""
    adapter = mixed(G, mix, "saved")
    try:
        return adapter.save(path, composition=mix.label)
    finally:
        adapter.remove()


def best_file(cohort: Cohort, subject: Subject, study: str) -> Path:
    return cohort.folder(subject) / f"{study}_best.safetensors"


def best(scores: Mapping[Mix, tuple[float, float]]) -> Mix:
    """The mixture of person and style with the largest harmonic mean of identity and style."""
    together = {mix: both(*found) for mix, found in scores.items() if mix.identity and mix.style}
    return max(together, key=lambda mix: together[mix])


def cameras(cohort: Cohort, subject: Subject, effort: Effort) -> tuple[Tensor, Tensor]:
    """Latents (N, w_dim) and labels (V, 25) that everything is rendered from."""
    return cohort.anchors(subject).w[: effort.photos], cohort.views(effort.views)


def source(what: str, mask: Mask) -> str:
    """The name of an adapter on a `loaded` generator; the person's own is the one that `Cohort.model` has on."""
    if mask == FULL_MASK:
        return {"identity": "default"}.get(what, what)
    return "_".join([what, *mask])


def _weights(G: TriPlaneGenerator, what: str, mask: Mask, trained: bool) -> dict[str, float | Mapping[str, float]]:
    if trained:
        return {source(what, mask): 1.0}
    return {source(what, FULL_MASK): 1.0 if mask == FULL_MASK else masked_weights(G, mask)}
