"""The people of a study and their models, made when first asked for and kept on disk, so that a study resumes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import convlora
from convlora import Adapter
from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos, load_album
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.blocks import FULL_MASK, Mask, mask_name, masked_ranks
from convlora.integrations.eg3d.checkpoint import SHIPPED, load_generator, save_generator
from convlora.integrations.eg3d.demo import LAB_SETTINGS
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.images import Rows, save_sheet
from convlora.integrations.eg3d.networks import choose_networks
from convlora.integrations.eg3d.personalize import TARGETS, Preset, inject_personal, parameter_groups, tune, unfreeze
from convlora.integrations.eg3d.pipeline import Networks, Settings
from convlora.integrations.eg3d.run_folder import RunFolder, write_text
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Results, Value
from convlora.integrations.eg3d.tasks.hull import Hull, make_hull
from convlora.methods import METHODS

if TYPE_CHECKING:
    from convlora.integrations.eg3d.lab import Person, Species
    from convlora.integrations.eg3d.lab.truth import Truth

#: An attribute of pictures: (images, labels, attribute) -> (N,).
Score = Callable[[Tensor, Tensor, str], Tensor]


class Kind(NamedTuple):
    """A way to make a person's model: "pretrained" (not at all), "full", or a method of the adapter library."""

    method: str = "lora"
    rank: int = 1
    photos: int | None = None  # of the album; None: the cohort's number
    numbers_of: str | None = None  # a method: ranks are raised until as many numbers are trained as by it
    preset: Preset = "true_rank"
    blocks: Mask = FULL_MASK  # rank 0 in all others

    @property
    def label(self) -> str:
        if self.method in ("pretrained", "full"):
            return {"pretrained": "pretrained", "full": "full fine-tuning"}[self.method]
        size = "" if self.numbers_of is None else f" with the numbers of {_named(self.numbers_of)}"
        size += "" if self.preset == "true_rank" else f" {self.preset} preset"
        size += "" if self.blocks == FULL_MASK else f" in {mask_name(self.blocks)}"
        photos = "" if self.photos is None else f", {self.photos} photo{'s' * (self.photos != 1)}"
        return f"{_named(self.method)} rank {self.rank}{size}{photos}"


def _named(method: str) -> str:
    return {"lora": "LoRA", "para": "PaRa", "deft": "DEFT"}.get(method, method)


PRETRAINED, FULL, LORA = Kind("pretrained"), Kind("full"), Kind()

#: A method's learning rate as a multiple of the settings', which is LoRA's: docs/para.md has the sweep.
RATES = {"para": 4.0, "deft": 4.0}


class Subject(NamedTuple):
    """One person in one repetition: what every study measures with."""

    name: str
    seed: int
    train: Photos
    test: Photos
    reference: Tensor  # identity embeddings (K, D) of all photos outside the test set
    drawn: Person | None = None  # who the lab drew; None: somebody's photographs

    @property
    def who(self) -> tuple[str, int]:
        return self.name, self.seed


@dataclass(frozen=True)
class Cohort:
    """The people of a study, each learnt `seeds` times, in the folder `out`.

    Without `albums` they are drawn: individuals 0 … identities − 1 of the lab's species that `generator` ("lab" or
    "lab-cats") was trained on. `largest` photos are drawn of each, more than any study learns from. With `albums`,
    folders that `load_album` reads, they are the people there, and `identities` is their number.

    Reference embeddings are of all photos outside the test set. `perceptual_net` and `identity_net` choose the
    networks as in `choose_networks`. `known` is a folder of results (what `Results.write` wrote, by the same settings
    and effort) to go on from: people whose values stand there are not measured again, and their values count, whether
    they are of this cohort or not. `score(images (N, 3, R, R), labels (N, 25),
    attribute)` -> (N,) is what directions are found with where the lab has no scores of its own.

    Raises:
        ConvloraError: numbers below 1, more photos than there are, photographs without albums or without networks to
            measure them, albums of one name or without test photos.
    """

    out: Path
    identities: int = 9
    seeds: int = 1
    photos: int = 50
    largest: int = 100
    tests: int = 12
    settings: Settings = field(default=LAB_SETTINGS)
    device: str = "cpu"
    progress: bool = True
    generator: str = "lab"
    albums: tuple[Path, ...] = ()
    perceptual_net: str | None = None
    identity_net: str | None = None
    score: Score | None = None
    known: Path | None = None
    only: int | None = None  # this person alone: a worker's part

    def __post_init__(self) -> None:
        if min(self.identities, self.seeds, self.photos, self.tests) < 1 or self.photos > self.largest:
            raise ConvloraError(
                f"identities={self.identities}, seeds={self.seeds}, photos={self.photos} and tests={self.tests} must "
                f"be at least 1, and photos at most largest={self.largest}"
            )
        if not self.albums and self.generator not in SHIPPED:
            raise ConvloraError(
                f"there are no drawn people for {self.generator}: name the albums of those to measure with, one each"
            )
        if self.albums and len(self.albums) != self.identities:
            raise ConvloraError(f"identities={self.identities} must be the number of albums, {len(self.albums)}")

    @property
    def drawn(self) -> bool:
        """People are the lab's, and the truth about them is known."""
        return not self.albums

    @cached_property
    def species(self) -> Species:
        from convlora.integrations.eg3d import lab

        return next(kind for kind in lab.SPECIES.values() if kind.generator == self.generator)

    @cached_property
    def base(self) -> TriPlaneGenerator:
        return load_generator(self.generator, self.device).requires_grad_(False)

    @cached_property
    def networks(self) -> Networks:
        found, told = choose_networks(self.generator, self.perceptual_net, self.identity_net, self.device)
        if found.perceptual is None or found.identity is None:
            raise ConvloraError("a study needs a perceptual distance and an identity encoder: " + "; ".join(told))
        return found

    @property
    def record(self) -> dict[str, Any]:
        """What all values of the cohort depend on, besides the effort and whose they are."""
        record = {name: value for name, value in vars(self).items() if name in _RECORDED}
        return {**record, **vars(self.settings)}

    def opened(self) -> RunFolder:
        """The folder with its lock; it belongs to one cohort's settings."""
        return RunFolder(self.out, {**self.record, "albums": [str(album.resolve()) for album in self.albums]})

    @cached_property
    def subjects(self) -> list[Subject]:
        """Everyone, drawing albums that are not there yet."""
        chosen = slice(None) if self.only is None else slice(self.only, self.only + 1)
        if self.albums:
            found = [self._photographed(folder) for folder in self.albums[chosen]]
            names = [one.name for one in found]
            if len(set(map(_slug, names))) < len(names):
                raise ConvloraError(f"albums must be of different people; theirs are {', '.join(names)}")
        else:
            from convlora.integrations.eg3d import lab

            people = lab.evaluation_people(self.identities, self.species)[chosen]
            found = [self._drawn(person) for person in people]
        return [one._replace(seed=seed) for one in found for seed in range(self.seeds)]

    def _drawn(self, person: Person) -> Subject:
        from convlora.integrations.eg3d import lab

        folder = self.out / _slug(person.name) / "album"
        if not (folder / "manifest.json").is_file():
            for half_done in folder.glob("*"):
                half_done.unlink()
            lab.write_album(person, folder, train=self.largest, test=self.tests, resolution=self.base.img_resolution)
        return self._photographed(folder)._replace(drawn=person)

    def _photographed(self, folder: Path) -> Subject:
        album = load_album(folder, self.base.img_resolution, self.tests)
        if len(album.train) < self.photos or not len(album.test):
            raise ConvloraError(
                f"{folder} has {len(album.train)} photos to learn from and {len(album.test)} held out; "
                f"{self.photos} and at least 1 are needed"
            )
        train, test = album.train, album.test
        return Subject(album.person, 0, train, test.first(self.tests), self.embed(train.images))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(N, D) identity embeddings of images (N, 3, R, R), on the CPU."""
        assert self.networks.identity is not None
        return torch.cat([self.networks.identity(part).cpu() for part in images.split(64)])

    @torch.no_grad()
    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """(N,): the perceptual distance of images (N, 3, R, R)."""
        assert self.networks.perceptual is not None
        return torch.cat([self.networks.perceptual(x, y).flatten().cpu() for x, y in zip(a.split(16), b.split(16))])

    # ---------------------------------------------------------------------------------------- what a study measured

    def measuring(self, results: Results, effort: Effort) -> Iterator[Subject]:
        """The subjects to measure, one after the other; those measured with this effort before are read from disk.

        They are read from `out`, or from the results in `known`, by whoever measured them; whoever else is in `known`
        is added in the end. What the body of the loop adds to `results` is written when it asks for the next subject.
        What values depend on besides the cohort and the effort is in `results.facts` by then: values of other facts
        are measured again.
        """
        elsewhere = self._known(results, effort)
        for subject in self.subjects:
            path = self.folder(subject) / "values" / f"{results.name}.json"
            published = elsewhere.pop(subject.who, None)
            known = _read_values(path, effort, results.facts) or published
            if known is not None:
                results.values += known
                continue
            first = len(results.values)
            yield subject
            record = {"effort": asdict(effort), "facts": results.facts, "values": results.values[first:]}
            write_text(path, json.dumps(record, ensure_ascii=False))
        if self.only is None:
            results.values += [value for values in elsewhere.values() for value in values]

    def _known(self, results: Results, effort: Effort) -> dict[tuple[str, int], list[Value]]:
        """What the folder `known` holds of the study of `results`, by (person, seed); `results` remember whose it is.

        Raises:
            ConvloraError: it is of other settings, another effort or other facts.
        """
        study = results.name
        if self.known is None or not (self.known / f"{study}.json").is_file():
            return {}
        before = Results.read(self.known, study)
        told = {"effort": str(effort), "settings": json.loads(json.dumps(self.record)), **results.facts}
        for what, ours in told.items():
            theirs = before.facts.get(what)
            if theirs != ours:
                if isinstance(theirs, dict) and isinstance(ours, dict):  # what differs alone
                    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
                    theirs, ours = ({name: told.get(name) for name in names} for told in (theirs, ours))
                raise ConvloraError(f"{self.known} holds study {study} of other {what}: {theirs}, not {ours}")
        results.extends = {name: before.facts[name] for name in _ORIGIN if name in before.facts}
        found: dict[tuple[str, int], list[Value]] = {}
        for value in before.values:
            found.setdefault((value.person, value.seed), []).append(value)
        return found

    def show(self, results: Results, subject: Subject, rows: Rows) -> None:
        """Write a sheet of pictures for the page, of the first person only."""
        if subject.name == self.subjects[0].name and subject.seed == 0 and not self.only:
            save_sheet(self.out / f"{results.name}_pictures.webp", rows)

    def held_out(self, subject: Subject, count: int | None = None) -> Photos:
        """The first `count` photos outside the training set; None: all."""
        return subject.test if count is None else subject.test.first(count)

    def moments(self, subject: Subject, count: int) -> tuple[Tensor, Tensor]:
        """params and traits of the first `count` held-out photos: what was drawn."""
        from convlora.integrations.eg3d.lab import people

        assert subject.drawn is not None
        shot = people.photos(subject.drawn, "test", count, 16)
        return shot.params, shot.traits

    def truth(self, subject: Subject, count: int, labels: Tensor) -> Truth:
        """The first `count` held-out moments as they are from cameras labels (V, 25)."""
        from convlora.integrations.eg3d.lab.truth import true_views

        side = self.base.img_resolution, self.base.neural_rendering_resolution
        return true_views(*self.moments(subject, count), labels.cpu(), *side, self.species)

    # ---------------------------------------------------------------------------------------------- a person's models

    def album(self, subject: Subject, count: int | None = None) -> Photos:
        """The photos to learn from: nested random subsets, others for every seed; the first `count`."""
        count = count or self.photos
        if count > len(subject.train):
            raise ConvloraError(f"{subject.name} has {len(subject.train)} photos to learn from, not {count}")
        order = torch.randperm(len(subject.train), generator=torch.Generator().manual_seed(subject.seed))
        chosen = sorted(order[:count].tolist())
        return subject.train.part(chosen)

    def anchors(self, subject: Subject, count: int | None = None) -> Anchors:
        """Of the photos of `album`; a photo's anchor is found once, whatever subsets it is in."""
        photos = self.album(subject, count)
        path = self.out / _slug(subject.name) / "anchors.safetensors"
        partial = path.with_suffix(".partial")
        known = Anchors.load(path) if path.is_file() else None
        if partial.is_file():  # an interrupted search, perhaps of another subset
            found = Anchors.load(partial)
            known = found if known is None else known.extended(found)
            known.save(path)
            partial.unlink()
        missing = [i for i, name in enumerate(photos.names) if known is None or name not in known.names]
        if missing:
            settings = self.settings
            found = find_anchors(
                self.base, photos.part(missing), settings.anchor_steps, init=self.networks.encoder or "mean",
                perceptual=self.networks.perceptual, perceptual_weight=settings.perceptual_weight,
                lr=settings.anchor_lr, checkpoint=partial, progress=self.progress,
                description=f"{subject.name}: {len(missing)} anchors",
            )  # fmt: skip
            known = found if known is None else known.extended(found)
            known.save(path)
            partial.unlink()
        assert known is not None
        rows = [known.names.index(name) for name in photos.names]
        return Anchors(known.w[rows], photos.names, known.loss[rows])

    def hull(self, subject: Subject, dilation: float = 2.0) -> Hull:
        return make_hull(self.anchors(subject).w.to(self.device), dilation)

    def model(self, subject: Subject, kind: Kind) -> TriPlaneGenerator:
        """The person's generator, frozen; trained now if its file is not there."""
        if kind.method == "pretrained":
            return self.base
        path = self.file(subject, kind)
        if kind.method == "full":
            return load_generator(path, self.device).requires_grad_(False)
        model = copy.deepcopy(self.base)
        for parameter in convlora.load_adapter(model, path).parameters():
            parameter.requires_grad_(False)
        return model

    def file(self, subject: Subject, kind: Kind) -> Path:
        """The person's adapter, or for "full" the whole generator; trained now if it is not there."""
        if kind.photos == self.photos:
            kind = kind._replace(photos=None)
        path = self.folder(subject) / f"{kind.label.replace(' ', '_').replace(',', '')}.safetensors"
        if not path.is_file():
            self._train(subject, kind, path)
        return path

    def _train(self, subject: Subject, kind: Kind, path: Path) -> None:
        settings, photos, anchors = self.settings, self.album(subject, kind.photos), self.anchors(subject, kind.photos)
        model = copy.deepcopy(self.base)
        torch.manual_seed(subject.seed)
        groups: list[dict[str, Any]]
        adapter: Adapter | None = None
        if kind.method == "full":
            groups = [{"params": unfreeze(model), "lr": settings.lr_full}]
        else:
            adapter = inject_kind(model, kind, settings.steps)
            groups = parameter_groups(adapter, settings.lr * RATES.get(kind.method, 1.0), settings.lr_full)
        tune(
            model, photos, anchors, groups, steps=settings.steps, batch_size=min(settings.batch_size, len(photos)),
            adapter=adapter, perceptual=self.networks.perceptual, perceptual_weight=settings.perceptual_weight,
            seed=subject.seed, checkpoint=path.with_suffix(".ckpt"), progress=self.progress,
            description=f"{subject.name}: {kind.label}",
        )  # fmt: skip
        if adapter is None:
            save_generator(model.requires_grad_(False), path)
        else:
            adapter.save(path, person=subject.name, consent=self.species.consent if self.drawn else "see its album")
        path.with_suffix(".ckpt").unlink(missing_ok=True)

    def folder(self, subject: Subject) -> Path:
        return self.out / _slug(subject.name) / f"seed_{subject.seed}"

    def views(self, count: int, seed: int = 0) -> Tensor:
        """(count, 25) random novel views, the same for every model."""
        return cameras.random_views(count, seed=seed, **cameras.orbit_of(self.base.rendering_kwargs))


_ORIGIN = ("command", "date", "device", "measured", "extends")  # facts of results that others go on from

# more people or seeds may be added to a cohort later
_RECORDED = ("generator", "perceptual_net", "identity_net", "photos", "largest", "tests")


def inject_kind(model: TriPlaneGenerator, kind: Kind, steps: int = 0) -> Adapter:
    """The adapter of a kind that is one, fresh on the model; no layer's rank is above what it can have.

    `steps`: of the tuning that follows. PaRa cannot start as the identity: it starts in the directions of least output
    energy, and takes them away little by little over the first tenth of the steps.
    """
    if kind.preset != "true_rank":
        return inject_personal(model, kind.rank, kind.preset)
    options: dict[str, Any] = {"init": "least_energy", "warmup": steps // 10} if kind.method == "para" else {}
    method = METHODS[kind.method]
    limits = {
        row.name: method.rank_limit(row.shape, options)
        for row in convlora.adaptable(model, list(TARGETS))  # from coarse to fine
        if not method.skips(row.shape, options)
    }
    if kind.blocks != FULL_MASK:
        off = {row.name for row in convlora.adaptable(model, list(masked_ranks(model, kind.blocks)))}
        limits = {layer: 0 if layer in off else limit for layer, limit in limits.items()}
    ranks = {layer: min(kind.rank, limit) for layer, limit in limits.items()}
    if kind.numbers_of is not None:
        wanted = trainables(model, Kind(kind.numbers_of, kind.rank))
        left = wanted - trainables(model, kind._replace(numbers_of=None))
        ranks = _raised(ranks, limits, _sizes(model, kind.method), left)
    return convlora.inject(
        model, kind.method, kind.rank, targets=list(TARGETS), ranks=ranks, train=["decoder"], **options
    )


def _sizes(model: TriPlaneGenerator, method: str) -> dict[str, int]:
    """By layer, how many numbers one rank of a method trains."""
    adapter = convlora.inject(model, method, 1, targets=list(TARGETS))
    try:
        return {layer: sum(p.numel() for p in change.parameters()) for layer, change in adapter.layers.items()}
    finally:
        adapter.remove()


def _raised(ranks: Mapping[str, int], limits: Mapping[str, int], sizes: Mapping[str, int], left: int) -> dict[str, int]:
    """Ranks raised as far as `left` more numbers reach: all by one as often as that fits, then the first by one."""
    ranks = dict(ranks)
    while growing := [layer for layer, rank in ranks.items() if rank < limits[layer]]:
        together = sum(sizes[layer] for layer in growing) <= left
        for layer in growing:
            if sizes[layer] <= left:
                ranks[layer] += 1
                left -= sizes[layer]
        if not together:
            break
    return ranks


def trainables(model: TriPlaneGenerator, kind: Kind) -> int:
    """How many numbers an adapter of a kind trains; the model stays as it is."""
    adapter = inject_kind(model, kind)
    try:
        return adapter.num_trainable
    finally:
        adapter.remove()


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def _read_values(path: Path, effort: Effort, facts: Mapping[str, Any]) -> list[Value] | None:
    """None: there are none yet, or they were measured with another effort or other facts."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps({"effort": asdict(effort), "facts": facts}))
    if record["effort"] != asked["effort"] or record.get("facts", {}) != asked["facts"]:
        return None
    return [Value(*value) for value in record["values"]]
