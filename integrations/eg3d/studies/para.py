"""PaRa (https://arxiv.org/abs/2406.05641) beside LoRA and DEFT (https://arxiv.org/abs/2509.22793), on people and on
a single photo."""

from __future__ import annotations

import torch
from torch import Tensor

from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.metrics import diversity, id_sim, psnr
from convlora.integrations.eg3d.metrics.loading import PerceptualDistance
from convlora.integrations.eg3d.studies.cohort import PRETRAINED, Cohort, Kind, Subject, trainables
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.inversion import METRICS, identity
from convlora.integrations.eg3d.studies.results import Claim, Results, by_name
from convlora.integrations.eg3d.tasks import invert, novel_views, synthesize
from convlora.integrations.eg3d.tasks.synthesize import sample_alpha

_SHOWN = 6


def paras_rank(effort: Effort) -> int:
    """The one of the ranks that stands for PaRa's own 4: the middle one."""
    return effort.ranks[len(effort.ranks) // 2]


def methods(cohort: Cohort, effort: Effort) -> Results:
    """LoRA, PaRa and DEFT at equal rank, and PaRa with as many numbers as LoRA: alignment and variety."""
    ranks = effort.ranks
    lora, para, deft = ([Kind(method, rank) for rank in ranks] for method in ("lora", "para", "deft"))
    # With the numbers of a still larger LoRA, hardly an output direction would be left.
    equal = [Kind("para", rank, numbers_of="lora") for rank in ranks[: len(ranks) // 2 + 1]]
    metrics = METRICS | {
        "ID_sim synthesis": "of random points between anchors, random cameras; higher is better",
        "diversity": "of the same: perceptual distance within clusters around the photos (Ojha et al.), mean",
    }
    results = Results("P1", "PaRa, LoRA and DEFT", metrics, _claims(effort, equal))
    perceptual = cohort.networks.perceptual
    assert isinstance(perceptual, PerceptualDistance)
    for subject in cohort.measuring(results, effort):
        photos, album = cohort.held_out(subject, effort.photos), cohort.album(subject)
        hull, names = cohort.hull(subject, dilation=1.0), photos.names
        shown = [("held-out photo", photos.images[:_SHOWN])]
        for kind in (PRETRAINED, *lora, *para, *equal, *deft):
            model = cohort.model(subject, kind)
            found = invert(
                model, photos, effort.latent_steps, 0, target="none", views=cohort.views(effort.views),
                init=cohort.networks.encoder or "mean", lr=cohort.settings.anchor_lr, perceptual=perceptual,
                seed=subject.seed, progress=cohort.progress,
            )  # fmt: skip
            made = synthesize(model, hull, effort.samples, seed=subject.seed, progress=cohort.progress).images
            varied = diversity(made, album.images, perceptual, seed=subject.seed)
            values = {
                "perceptual": by_name(names, cohort.perceptual(found.images, photos.images)),
                "PSNR": by_name(names, psnr(found.images, photos.images)),
                "ID_sim": by_name(names, identity(cohort, subject, found.views)),
                "ID_sim synthesis": _numbered("sample", id_sim(cohort.embed(made), subject.reference)),
                "diversity": {"all": varied.mean},
            }
            for metric, each in values.items():
                results.add(kind.label, metric, *subject.who, each)
            shown.append((kind.label, found.images[:_SHOWN]))
        cohort.show(results, subject, shown)
    sizes = (f"{kind.label} {trainables(cohort.base, kind):,}" for kind in (*lora, *para, *equal, *deft))
    results.notes.append(f"Trainables, the decoder's included: {', '.join(sizes)}.")
    return results


def _claims(effort: Effort, equal: list[Kind]) -> list[Claim]:
    """What the papers say, of the metrics that stand for it here."""
    rank, last = paras_rank(effort), effort.ranks[-1]
    lora, para, deft = (Kind(method, rank).label for method in ("lora", "para", "deft"))
    better = [
        (para, lora, f"PaRa aligns better with the target than LoRA at rank {rank}"),
        *((kind.label, Kind(rank=kind.rank).label, f"so it does with the numbers of LoRA rank {kind.rank}")
          for kind in equal),
        (deft, lora, f"DEFT aligns better than LoRA at rank {rank}"),
        (deft, para, f"DEFT aligns better than PaRa at rank {rank}"),
    ]  # fmt: skip
    first, largest = Kind("para", effort.ranks[0]).label, Kind("para", last).label
    return [
        *(Claim(text, metric, one, other, lower_is_better=metric == "perceptual")
          for one, other, text in better for metric in ("perceptual", "ID_sim")),
        Claim(f"PaRa makes less diverse pictures than LoRA at rank {rank}", "diversity", para, lora,
              lower_is_better=True),
        Claim(f"PaRa's pictures are less diverse at rank {last} than at {effort.ranks[0]}", "diversity", largest,
              first, lower_is_better=True),
    ]  # fmt: skip


def single_photo(cohort: Cohort, effort: Effort) -> Results:
    """PaRa and LoRA of growing rank tuned to one photo: how much of the generator's variety is left around it?

    PaRa's paper edits a single image so: at a high rank any noise gives nearly the image, and none need be inverted.
    """
    ranks = (*effort.ranks, 4 * effort.ranks[-1])
    lora, para = ([Kind(method, rank, photos=1) for rank in ranks] for method in ("lora", "para"))
    metrics = {
        "perceptual": "distance of the photo to its rendering; lower is better",
        "PSNR": "dB, of the same; higher is better",
        "spread hull": "perceptual distance of two random points between the person's anchors, from the photo's camera",
        "spread prior": "the same of two random points of the whole generator",
        "variance hull": "of pixels in [-1, 1] over random points between anchors: half the squared difference of two",
        "variance prior": "the same over the whole generator",
        "closeness": "perceptual distance of random points of the whole generator to the photo; lower is closer",
        "ID_sim": "of novel views of the photo's latent, largest cosine with the person's photos; higher is better",
        "turn": "perceptual distance of these views to the one from the photo's camera",
        "edit": "perceptual distance that moving half-way to another photo's latent makes",
    }
    results = Results("P2", "One photo, PaRa and LoRA of growing rank", metrics, _single_claims(lora, para))
    for subject in cohort.measuring(results, effort):
        photo = cohort.album(subject, 1)
        shown: list[tuple[str, Tensor]] = [("photo", photo.images)]
        for kind in (PRETRAINED, *para, *lora):
            made = _around(cohort, subject, kind, effort)
            values = {
                "perceptual": by_name(photo.names, cohort.perceptual(made["own"], photo.images)),
                "PSNR": by_name(photo.names, psnr(made["own"], photo.images)),
                "closeness": _numbered("sample", cohort.perceptual(made["prior"], _like(photo.images, made["prior"]))),
                "ID_sim": _numbered("view", identity(cohort, subject, made["views"][:, None])),
                "turn": _numbered("view", cohort.perceptual(made["views"], _like(made["own"], made["views"]))),
                "edit": _numbered("photo", cohort.perceptual(made["moved"], _like(made["own"], made["moved"]))),
            }
            for place in ("hull", "prior"):  # two by two, so that each pair is independent of the others
                one, other = made[place][0::2], made[place][1::2]
                half = (one - other).square().mean((1, 2, 3)) / 2
                values[f"spread {place}"] = _numbered("pair", cohort.perceptual(one, other))
                values[f"variance {place}"] = _numbered("pair", half)
            for metric, each in values.items():
                results.add(kind.label, metric, *subject.who, each)
            row = torch.cat([made["own"], made["views"][:2], made["moved"][:1]])
            shown += [
                (f"{kind.label}: the photo, turned, moved", row),
                (f"{kind.label}: any latents", made["prior"][:_SHOWN]),
            ]
        cohort.show(results, subject, shown)
    results.notes.append("No layer's rank is above what it can have; for PaRa that is below its number of outputs.")
    return results


def _single_claims(lora: list[Kind], para: list[Kind]) -> list[Claim]:
    first, last, loras = para[0].label, para[-1].label, lora[-1].label
    small, rank = para[0].rank, para[-1].rank
    views = f"a camera move changes the picture of PaRa rank {rank} about as much as the pretrained generator's"
    return [
        *(Claim(f"PaRa's output varies less at rank {rank} than at {small}", metric, last, first, lower_is_better=True)
          for metric in ("spread hull", "spread prior", "variance prior")),
        Claim(f"it varies less than LoRA's at rank {rank}", "spread prior", last, loras, lower_is_better=True),
        Claim("random latents come closer to the photo than the pretrained generator's", "closeness", last,
              PRETRAINED.label, lower_is_better=True),
        Claim("they come closer to it than LoRA's", "closeness", last, loras, lower_is_better=True),
        Claim(f"the photo is fitted about as well as by LoRA of rank {rank}", "perceptual", last, loras, -0.02,
              lower_is_better=True),
        Claim(views, "turn", last, PRETRAINED.label, -0.05),
        Claim("novel views keep identity better than the pretrained generator's", "ID_sim", last, PRETRAINED.label),
    ]  # fmt: skip


def _around(cohort: Cohort, subject: Subject, kind: Kind, effort: Effort) -> dict[str, Tensor]:
    """Pictures (…, 3, R, R) of a model tuned to one photo, the same latents and cameras for every model.

    From the photo's camera: "own" (1) of its latent, "hull" and "prior" (samples) of random ones, "moved" (pairs) of
    its latent half-way to other photos'; and "views" (views) of its latent from other cameras.
    """
    model, own, camera = cohort.model(subject, kind), cohort.anchors(subject, 1).w, cohort.album(subject, 1).labels
    count = 2 * max(1, effort.samples // 2)
    hull = cohort.hull(subject, dilation=1.0)
    latents = {
        "own": own,
        "hull": hull.w(sample_alpha(hull, count, seed=subject.seed)),
        "prior": _random_latents(cohort.base, camera, count, subject.seed),
        "moved": (own + cohort.anchors(subject).w[: effort.pairs + 1]) / 2,
    }
    away = (latents["moved"] - own).abs().amax(1) > 0  # the photo itself is among the person's
    latents["moved"] = latents["moved"][away][: effort.pairs]
    made = {place: novel_views(model, w, camera)[:, 0] for place, w in latents.items()}
    return {**made, "views": novel_views(model, own, cohort.views(effort.views))[0]}


@torch.no_grad()
def _random_latents(G: TriPlaneGenerator, camera: Tensor, count: int, seed: int) -> Tensor:
    """(count, w_dim) of z drawn at random, mapped for one camera (1, 25)."""
    z = torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(seed))
    device = next(G.parameters()).device
    return G.mapping(z.to(device), camera.to(device).expand(count, -1))[:, 0]


def _like(image: Tensor, images: Tensor) -> Tensor:
    """One image (1, 3, R, R) as often as there are others."""
    return image.expand_as(images)


def _numbered(what: str, values: Tensor) -> dict[str, float]:
    return by_name([f"{what} {i}" for i in range(len(values))], values)
