"""Block-wise LoRA: a person and a style in one adapter, over which blocks each should reach, and how they are at odds.

The paper (https://arxiv.org/abs/2403.07500) judges by pictures and gives no numbers.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

import convlora
from convlora import Adapter
from convlora.analysis import Conflict
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.blocks import FULL_MASK, GROUPS, Mask, mask_name, masked_weights, masks, rest
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.metrics import id_sim
from convlora.integrations.eg3d.studies.cohort import Cohort, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.heat import heat_map
from convlora.integrations.eg3d.studies.mixtures import (
    BOTH_FULL,
    IDENTITY_BLOCKS,
    Mix,
    best,
    best_file,
    cameras,
    loaded,
    mixes,
    save_mix,
    source,
    views,
)
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.studies.styles import Styles, both
from convlora.integrations.eg3d.tasks import novel_views

STYLE = "cartoon"
_DRAWN_OVER = "identity full, drawn over in the style"
_NOBODY = "pretrained, drawn over in the style"
_SHOWN = 6
METRICS = {
    "identity": "ID_sim of novel views with the person's photos drawn over in the style; higher is better",
    "style": "share of the perceptual way from the person's rendering to it drawn over; higher is better",
    "style statistics": "the same of means and standard deviations of feature channels; higher is better",
}


def block_wise(cohort: Cohort, effort: Effort, style: str = STYLE) -> Results:
    """B1: the person's adapter and a style's over all 16 masks, three of which the style was also trained with."""
    results = Results(_named("B1", style), f"Block-wise LoRA: a person in the style {style}", METRICS)
    styles = _styles(cohort, results.name, style)
    for subject in cohort.measuring(results, effort):
        chosen = styles.chosen(effort.views)
        G = loaded(cohort, subject, styles, chosen)
        seen = _Seen(cohort, effort, subject, styles, views(G, Mix(FULL_MASK, ()), cohort, subject, effort))
        nobody = styles.draw(novel_views(cohort.base, *seen.cameras))
        shown = [("identity alone", seen.alone[:_SHOWN, 0]), ("drawn over in the style", seen.target[:_SHOWN, 0])]
        for label, images in ((_DRAWN_OVER, seen.target), (_NOBODY, nobody)):
            results.add(label, "identity", *subject.who, by_name(seen.names, seen.identity(images)))
        found: dict[Mix, tuple[float, float]] = {}
        for mix in mixes(chosen):
            images = views(G, mix, cohort, subject, effort)
            scores = seen.scores(images)
            for metric, values in scores.items():
                results.add(mix.label, metric, *subject.who, by_name(seen.names, values))
            found[mix] = float(scores["identity"].mean()), float(scores["style"].mean())
            if mix in _pictured(chosen):
                shown.append((mix.label.replace(", ", ",\n"), images[:_SHOWN, 0]))
        save_mix(G, best(found), best_file(cohort, subject, results.name))
        cohort.show(results, subject, shown)
    results.claims = claims(results.models())
    results.notes += [
        f"The style is trained on {styles.style} drawings of ordinary heads, none of them measured here, with LoRA of "
        "rank 4 and the base's decoder. Masks: coarse is 4² and 8², middle 16² and 32², fine the rest of the backbone, "
        "sr the super-resolution. The person's decoder counts whatever the mask.",
        "'trained so' had rank 0 elsewhere in training; all others are full adapters, masked when they are combined. "
        "The masks to train were chosen on other heads, before anybody was measured.",
        f"'{_DRAWN_OVER}' is the most that identity can be expected to reach, '{_NOBODY}' what nobody reaches.",
        *_best_notes(results),
    ]
    if cohort.only is None and results.values:
        with contextlib.suppress(ConvloraError):  # without matplotlib, as `Results.write`
            heat_map(results, _rows(), cohort.out / f"{results.name}_masks.png")
    return results


def conflicts(cohort: Cohort, effort: Effort, style: str = STYLE) -> Results:
    """B2: how a person's adapter and a style's disturb each other, group by group, in the weights and in pictures."""
    metrics = {
        "cosine": "of the two ΔW as vectors, in effective units",
        "magnitude ratio": "‖ΔW identity‖/‖ΔW style‖",
        "column angle": "smallest principal angle of the output spaces in degrees, mean over layers",
        "row angle": "the same of the input spaces",
        "sign disagreement": "share of the values that are changed in opposite directions",
        "change": "perceptual distance that the style's blocks make to the person's rendering",
        "identity drop": "ID_sim that the style's blocks cost, with photos plain and drawn over; lower is better",
        "style drop": "style score that the person's adapter costs the style's blocks; lower is better",
    }
    results = Results(_named("B2", style), f"Conflict of identity and style by blocks, {style}", metrics)
    styles = _styles(cohort, results.name, style)
    for subject in cohort.measuring(results, effort):
        G = loaded(cohort, subject, styles, [])
        seen = _Seen(cohort, effort, subject, styles, views(G, Mix(FULL_MASK, ()), cohort, subject, effort))
        nobody = _Seen(cohort, effort, subject, styles, novel_views(cohort.base, *seen.cameras))
        for mask in [*((group,) for group in GROUPS), FULL_MASK]:
            for metric, value in _weights_at_odds(G, mask).items():
                results.add(mask_name(mask), metric, *subject.who, {"all": value})
            images = views(G, Mix(FULL_MASK, mask), cohort, subject, effort)
            alone = views(G, Mix((), mask), cohort, subject, effort)
            found = {
                "change": seen.distance(images, seen.alone),
                "identity drop": seen.likeness(seen.alone) - seen.likeness(images),
                "style drop": nobody.scores(alone)["style"] - seen.scores(images)["style"],
            }
            for metric, values in found.items():
                results.add(mask_name(mask), metric, *subject.who, by_name(seen.names, values))
    results.notes.append("The paper measures no conflict. Both adapters are full ones, masked to the groups named.")
    return results


def claims(models: Iterable[str]) -> list[Claim]:
    """What the paper says, of the masks that were trained."""
    models = list(models)
    trained = [mask for mask in masks() if Mix(FULL_MASK, mask, style_trained=True).label in models]
    found = []
    for mask in trained:
        best_of, name = Mix(FULL_MASK, mask, style_trained=True), mask_name(mask)
        masked, in_blocks = Mix(FULL_MASK, mask), Mix(IDENTITY_BLOCKS, mask, True, True)
        found += [
            Claim(f"full identity keeps more of itself with the style trained in {name} than with the full style",
                  "identity", best_of.label, BOTH_FULL.label),
            Claim(f"the style trained in {name} is about as strong as the full style over the full identity",
                  "style", best_of.label, BOTH_FULL.label, -0.05),
            Claim(f"the style is stronger where training knew the mask {name}", "style", best_of.label, masked.label),
            Claim(f"identity is better kept where training knew the mask {name}", "identity", best_of.label,
                  masked.label),
            Claim(f"identity is better kept full than block-wise under the style trained in {name}", "identity",
                  best_of.label, in_blocks.label),
        ]  # fmt: skip
    return [
        *found,
        Claim("the full style is weaker over a block-wise identity", "style", BOTH_FULL.label,
              Mix(IDENTITY_BLOCKS, FULL_MASK, True).label),
        Claim("a style lives in fine blocks rather than in coarse ones", "style", Mix(FULL_MASK, ("fine",)).label,
              Mix(FULL_MASK, ("coarse",)).label),
    ]  # fmt: skip


def _named(study: str, style: str) -> str:
    return study if style == STYLE else f"{study}_{style}"


def _styles(cohort: Cohort, study: str, style: str) -> Styles:
    if not cohort.drawn:
        raise ConvloraError(
            f"{study} learns its styles from drawings whose latents are known, so it needs the lab's people: "
            "leave the albums away"
        )
    return Styles(cohort, style)


# ------------------------------------------------------------------------------------------------------------- scores


class _Seen:
    """A rendering (N, V, 3, R, R) without a style, the same drawn over, and how others compare with both."""

    def __init__(self, cohort: Cohort, effort: Effort, subject: Subject, styles: Styles, alone: Tensor) -> None:
        self.cohort, self.alone, self.target = cohort, alone, styles.draw(alone)
        self.cameras = cameras(cohort, subject, effort)
        self.names = cohort.album(subject).names[: len(alone)]
        self.reference = cohort.embed(styles.draw(subject.train.images))
        self.any_reference = torch.cat([subject.reference, self.reference])
        self.away = self.distance(alone, self.target)
        self.apart = self._statistics_apart(alone)

    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """Each (N,), over the views."""
        return {
            "identity": self.identity(images),
            "style": 1 - self.distance(images, self.target) / self.away,
            "style statistics": 1 - self._statistics_apart(images) / self.apart,
        }

    def identity(self, images: Tensor) -> Tensor:
        return self._like(images, self.reference)

    def likeness(self, images: Tensor) -> Tensor:
        """(N,): ID_sim with the person's photos, plain or drawn over: a style that is half there costs nothing."""
        return self._like(images, self.any_reference)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return self.cohort.perceptual(a.flatten(0, 1), b.flatten(0, 1)).view(a.shape[:2]).mean(1)

    def _like(self, images: Tensor, reference: Tensor) -> Tensor:
        return id_sim(self.cohort.embed(images.flatten(0, 1)), reference).view(images.shape[:2]).mean(1)

    def _statistics_apart(self, images: Tensor) -> Tensor:
        """(N,): relative distance of channel statistics from the target's, mean over stages and views."""
        found = [
            channel_statistics_distance(a, b)
            for a, b in zip(self._features(images), self._features(self.target), strict=True)
        ]
        return torch.stack(found).mean(0).view(images.shape[:2]).mean(1)

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Tensor]:
        """Means and standard deviations (N·V, 2·C) of the perceptual net's channels, stage by stage."""
        from convlora.integrations.eg3d.metrics.loading import PerceptualDistance

        net = self.cohort.networks.perceptual
        assert isinstance(net, PerceptualDistance)
        parts = [[channel_statistics(x).cpu() for x in net.features(p)] for p in images.flatten(0, 1).split(16)]
        return [torch.cat(stage) for stage in zip(*parts)]


def channel_statistics(features: Tensor) -> Tensor:
    """(N, 2·C): mean and standard deviation over positions of every channel of features (N, C, H, W).

    What style transfer calls style: Huang, Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization", ICCV 2017, equation 13.
    """
    flat = features.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2, unbiased=False)], 1)


def channel_statistics_distance(a: Tensor, b: Tensor) -> Tensor:
    """(N,): ‖a − b‖/‖b‖ of statistics (N, K)."""
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-12)


def _weights_at_odds(G: TriPlaneGenerator, mask: Mask) -> dict[str, float]:
    """The weight-space measures of the two full adapters over a mask's groups; adapters keep their strengths."""
    adapters = [Adapter.of(G, source(what, FULL_MASK)) for what in ("identity", "style")]
    for adapter in adapters:
        adapter.set_strength(masked_weights(G, mask))
    try:
        return _summed(convlora.conflict(*adapters, signs=True))
    finally:
        for adapter in adapters:
            adapter.set_strength(1.0)


def _summed(found: Conflict) -> dict[str, float]:
    """A conflict in five numbers; NaN where one is not defined, which `Results` leaves out of means."""
    angles = {
        name: [min(angle) for layer in found.layers if (angle := getattr(layer, field))]
        for name, field in (("column angle", "column_angles"), ("row angle", "row_angles"))
    }
    total = {
        "cosine": found.total.cosine,
        "magnitude ratio": found.total.ratio,
        "sign disagreement": found.total.sign_disagreement,
        **{name: statistics.fmean(values) if values else None for name, values in angles.items()},
    }
    return {name: float("nan") if value is None else value for name, value in total.items()}


# ----------------------------------------------------------------------------------------------------- what is shown


def _pictured(chosen: list[Mask]) -> list[Mix]:
    """Whose pictures are on the page."""
    first = chosen[0]
    return [
        BOTH_FULL, Mix(FULL_MASK, first), Mix(FULL_MASK, first, style_trained=True), Mix(rest(first), first),
        Mix(IDENTITY_BLOCKS, FULL_MASK, True), Mix(IDENTITY_BLOCKS, first, True, True), Mix(FULL_MASK, ("coarse",)),
        Mix(FULL_MASK, ("fine",)), Mix(FULL_MASK, ("sr",)),
    ]  # fmt: skip


def _rows() -> dict[str, dict[str, str]]:
    """The heat map's rows: {row: {column: the model's label}}."""
    columns = {mask_name(mask): mask for mask in masks()}
    blocks = mask_name(IDENTITY_BLOCKS)
    rows = {
        "identity full": {name: Mix(FULL_MASK, mask) for name, mask in columns.items()},
        "identity full,\nstyle trained so": {
            name: Mix(FULL_MASK, mask, style_trained=True) for name, mask in columns.items()
        },
        "identity in the rest": {name: Mix(rest(mask), mask) for name, mask in columns.items() if mask},
        f"identity {blocks}\nwhen combined": {name: Mix(IDENTITY_BLOCKS, mask) for name, mask in columns.items()},
        f"identity {blocks}\ntrained so": {name: Mix(IDENTITY_BLOCKS, mask, True) for name, mask in columns.items()},
        "both trained so": {name: Mix(IDENTITY_BLOCKS, mask, True, True) for name, mask in columns.items()},
    }
    return {row: {name: mix.label for name, mix in found.items()} for row, found in rows.items()}


def _best_notes(results: Results) -> list[str]:
    """Whose best mixture is which, from the values."""
    known = {mix.label: mix for mix in mixes([mask for mask in masks() if mask])}
    scores: dict[tuple[str, int], dict[Mix, dict[str, list[float]]]] = {}
    for value in results.values:
        if value.model in known and value.metric in ("identity", "style"):
            of_mix = scores.setdefault((value.person, value.seed), {}).setdefault(known[value.model], {})
            of_mix.setdefault(value.metric, []).append(value.value)
    notes = []
    for (person, seed), found in scores.items():
        means = {m: (statistics.fmean(s["identity"]), statistics.fmean(s["style"])) for m, s in found.items()}
        notes.append(
            f"{person}, seed {seed}: the best harmonic mean of identity and style, {both(*means[best(means)]):.3f}, is "
            f"that of '{best(means).label}', kept as one adapter, {results.name}_best.safetensors."
        )
    return notes
