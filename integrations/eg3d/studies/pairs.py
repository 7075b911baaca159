"""Two people's PaRa adapters in one generator, without training it again (PaRa, https://arxiv.org/abs/2406.05641)."""

from __future__ import annotations

import copy
from typing import NamedTuple, cast

import torch
from torch import Tensor

import convlora
from convlora.compose import How
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.anchors import Anchors
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.studies.cohort import PRETRAINED, Cohort, Kind, Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import identity
from convlora.integrations.eg3d.studies.para import paras_rank
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import novel_views
from convlora.methods.para import PaRa, orthonormal

_SHOWN = 3
_OWN_FIRST, _OWN_LAST, _ORDERS = "PaRa sequential, own first", "PaRa sequential, own last", "own first against own last"
_UNION, _SUM, _LORAS, _ALONE = "PaRa union", "PaRa sum", "LoRA sum", "own PaRa alone"


class _Way(NamedTuple):
    """How two adapters become one: of which method, how, and whether the person's own comes first."""

    method: str
    how: How
    own_first: bool = True


_WAYS = {
    _UNION: _Way("para", "para_union"),
    _OWN_FIRST: _Way("para", "para_sequential"),
    _OWN_LAST: _Way("para", "para_sequential", False),
    _SUM: _Way("para", "concat"),
    _LORAS: _Way("lora", "concat"),
}


class _Pair(NamedTuple):
    own: Subject
    other: Subject


def combined(cohort: Cohort, effort: Effort) -> Results:
    """Every person with the one before: union, both sequences and the sum, beside each alone and the sum of two LoRA.

    Raises:
        ConvloraError: there is one person only.
    """
    if cohort.identities < 2:
        raise ConvloraError("P3 combines the adapters of two people and there is one: identities=2 or more is needed")
    rank = paras_rank(effort)
    metrics = {
        "ID_sim own": "of novel views at the person's own anchors with the person's photos; higher is better",
        "ID_sim other": "of novel views at the other person's anchors with the other's photos; higher is better",
        "perceptual": "distance of both persons' training photos to their anchors' renderings; lower is better",
        "order": "perceptual distance between the renderings of the two sequences",
        "overlap": "‖Q₁ᵀQ₂‖²/r of a layer's removed directions: 1 where they are the same, r/out by chance",
    }
    results = Results("P3", f"Two people's PaRa of rank {rank} in one generator", metrics, _claims())
    if cohort.only is not None:  # a worker has one person: it learns that one, and pairs are for who has them all
        for subject in cohort.subjects:
            for method in ("para", "lora"):
                cohort.file(subject, Kind(method, rank))
        return results
    for own in cohort.measuring(results, effort):
        pair = _Pair(own, _before(cohort, own))
        seen = [_seen(cohort, one, effort) for one in pair]
        shown = [(f"photos: {one.name}", photos.images[:_SHOWN]) for one, (photos, _) in zip(pair, seen)]
        rendered = {}
        for label, model in _models(cohort, pair, rank).items():
            images = [novel_views(model, anchors.w, photos.labels[:, None])[:, 0] for photos, anchors in seen]
            for whose, one, (photos, anchors), made in zip(("own", "other"), pair, seen, images):
                names = [f"{whose} {name}" for name in photos.names]
                views = novel_views(model, anchors.w, cohort.views(effort.views))
                results.add(label, f"ID_sim {whose}", *own.who, by_name(names, identity(cohort, one, views)))
                results.add(label, "perceptual", *own.who, by_name(names, cohort.perceptual(made, photos.images)))
            rendered[label] = torch.cat(images)
            shown.append((label, torch.cat([made[:_SHOWN] for made in images])))
        apart = cohort.perceptual(rendered[_OWN_FIRST], rendered[_OWN_LAST])
        results.add(_ORDERS, "order", *own.who, by_name(map(str, range(len(apart))), apart))
        for label, overlaps in _overlaps(cohort, pair, rank).items():
            results.add(label, "overlap", *own.who, overlaps)
        cohort.show(results, own, shown)
    results.notes.append("The decoder, trained in full, changes by the mean of the two people's changes in every way.")
    results.notes.append(
        "All PaRa start in the same directions, those of least output energy, where their overlap is 1."
    )
    return results


def _claims() -> list[Claim]:
    kept = [
        Claim(f"the union keeps the {whose} person better than the pretrained generator", f"ID_sim {whose}", _UNION,
              PRETRAINED.label)
        for whose in ("own", "other")
    ]  # fmt: skip
    return [
        *kept,
        Claim("the union keeps a person about as well as the person's PaRa alone", "ID_sim own", _UNION, _ALONE, -0.02),
        Claim("the union fits both better than the sum of two LoRA", "perceptual", _UNION, _LORAS,
              lower_is_better=True),
        Claim("the union fits both better than the sum of two PaRa", "perceptual", _UNION, _SUM, lower_is_better=True),
        Claim("who comes last in a sequence is kept better", "ID_sim own", _OWN_LAST, _OWN_FIRST),
    ]  # fmt: skip


def _before(cohort: Cohort, own: Subject) -> Subject:
    """The person before, in the same repetition; the first person's is the second. More people change no pair."""
    people = [one for one in cohort.subjects if one.seed == own.seed]
    place = [one.name for one in people].index(own.name)
    return people[place - 1 if place else 1]


def _seen(cohort: Cohort, one: Subject, effort: Effort) -> tuple[Photos, Anchors]:
    """The first of a person's training photos with their anchors."""
    photos, anchors = cohort.album(one).first(effort.photos or cohort.photos), cohort.anchors(one)
    return photos, Anchors(anchors.w[: len(photos)], photos.names, anchors.loss[: len(photos)])


def _models(cohort: Cohort, pair: _Pair, rank: int) -> dict[str, TriPlaneGenerator]:
    models = {PRETRAINED.label: cohort.base, _ALONE: cohort.model(pair.own, Kind("para", rank))}
    for label, way in _WAYS.items():
        model = copy.deepcopy(cohort.base)
        for name, one in zip(_Pair._fields, pair):
            convlora.load_adapter(model, cohort.file(one, Kind(way.method, rank)), name)
        names = _Pair._fields if way.own_first else reversed(_Pair._fields)
        mix = convlora.compose(model, {name: {"decoder*": 0.5, "*": 1.0} for name in names}, way.how)
        for parameter in mix.parameters():
            parameter.requires_grad_(False)
        models[label] = model
    return models


def _overlaps(cohort: Cohort, pair: _Pair, rank: int) -> dict[str, dict[str, float]]:
    """By layer ‖Q₁ᵀQ₂‖²/min(r₁, r₂) of the two people's directions, and what random ones would have."""
    directions = [_directions(cohort.model(one, Kind("para", rank))) for one in pair]
    found, chance = {}, {}
    for layer, first in directions[0].items():
        second = directions[1][layer]
        found[layer] = overlap(first, second)
        chance[layer] = max(first.shape[1], second.shape[1]) / len(first)
    return {"both people's directions": found, "random directions": chance}


def overlap(first: Tensor, second: Tensor) -> float:
    """‖Q₁ᵀQ₂‖²_F / min(r₁, r₂) of orthonormal columns (out, r₁) and (out, r₂): 0 if none is shared, 1 if all are."""
    return float((first.mT @ second).square().sum() / min(first.shape[1], second.shape[1]))


@torch.no_grad()
def _directions(model: TriPlaneGenerator) -> dict[str, Tensor]:
    """Layer -> Q (out, r) of a model's only adapter."""
    layers = convlora.Adapter.of(model).layers
    return {layer: orthonormal(cast(PaRa, change).B) for layer, change in layers.items()}
