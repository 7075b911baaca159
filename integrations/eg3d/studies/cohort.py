"""The people of a study and their models, made when first asked for and kept on disk, so that a study resumes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
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
from convlora.integrations.eg3d.checkpoint import load_generator, save_generator
from convlora.integrations.eg3d.demo import LAB_SETTINGS
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.images import Rows, save_sheet
from convlora.integrations.eg3d.networks import lab_networks
from convlora.integrations.eg3d.personalize import TARGETS, Preset, inject_personal, parameter_groups, tune, unfreeze
from convlora.integrations.eg3d.pipeline import Networks, Settings
from convlora.integrations.eg3d.run_folder import RunFolder, write_text
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.results import Results, Value
from convlora.integrations.eg3d.tasks.hull import Hull, make_hull

if TYPE_CHECKING:
    from convlora.integrations.eg3d.lab.truth import Truth


class Kind(NamedTuple):
    """A way to make a person's model: "pretrained" (not at all), "full", or a method of the adapter library."""

    method: str = "lora"
    rank: int = 1
    photos: int | None = None  # of the album; None: the cohort's number
    numbers_of: str | None = None  # a method: ranks are raised until as many numbers are trained as by it
    preset: Preset = "true_rank"

    @property
    def label(self) -> str:
        if self.method in ("pretrained", "full"):
            return {"pretrained": "pretrained", "full": "full fine-tuning"}[self.method]
        name = "LoRA" if self.method == "lora" else self.method
        size = "" if self.numbers_of is None else f" with the numbers of {self.numbers_of}"
        size += "" if self.preset == "true_rank" else f" {self.preset} preset"
        return f"{name} rank {self.rank}{size}" + ("" if self.photos is None else f", {self.photos} photos")


PRETRAINED, FULL, LORA = Kind("pretrained"), Kind("full"), Kind()


class Subject(NamedTuple):
    """One person in one repetition: what every study measures with."""

    person: Any  # lab.Person
    seed: int
    train: Photos
    test: Photos
    reference: Tensor  # identity embeddings (K, D) of all photos outside the test set

    @property
    def who(self) -> tuple[str, int]:
        return self.person.name, self.seed


@dataclass(frozen=True)
class Cohort:
    """Lab people 0 … identities − 1, each learnt `seeds` times, in the folder `out`.

    `largest` photos are drawn of each, more than any study learns from; reference embeddings are of all of them.
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
    only: int | None = None  # this person alone: a worker's part

    def __post_init__(self) -> None:
        if min(self.identities, self.seeds, self.photos, self.tests) < 1 or self.photos > self.largest:
            raise ConvloraError(
                f"identities={self.identities}, seeds={self.seeds}, photos={self.photos} and tests={self.tests} must "
                f"be at least 1, and photos at most largest={self.largest}"
            )

    @cached_property
    def base(self) -> TriPlaneGenerator:
        return load_generator("lab", self.device).requires_grad_(False)

    @cached_property
    def networks(self) -> Networks:
        return lab_networks(self.device)

    def opened(self) -> RunFolder:
        """The folder with its lock; it belongs to one cohort's settings."""
        record = {name: value for name, value in vars(self).items() if name in _RECORDED}
        return RunFolder(self.out, {**record, **vars(self.settings)})

    def subjects(self) -> list[Subject]:
        """Everyone, drawing albums that are not there yet."""
        return self._everyone

    @cached_property
    def _everyone(self) -> list[Subject]:
        from convlora.integrations.eg3d.lab import evaluation_people

        people = evaluation_people(self.identities)
        people = people if self.only is None else people[self.only : self.only + 1]
        return [self._subject(person, seed) for person in people for seed in range(self.seeds)]

    def _subject(self, person: Any, seed: int) -> Subject:
        from convlora.integrations.eg3d import lab

        folder = self.out / _slug(person.name) / "album"
        if not (folder / "manifest.json").is_file():
            for half_done in folder.glob("*"):
                half_done.unlink()
            lab.write_album(person, folder, train=self.largest, test=self.tests, resolution=self.base.img_resolution)
        album = load_album(folder, self.base.img_resolution)
        return Subject(person, seed, album.train, album.test, self.embed(album.train.images))

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

        What the body of the loop adds to `results` is written when it asks for the next subject.
        """
        for subject in self.subjects():
            path = self.folder(subject) / "values" / f"{results.name}.json"
            known = _read_values(path, effort)
            if known is not None:
                results.values += known
                continue
            first = len(results.values)
            yield subject
            record = {"effort": asdict(effort), "values": results.values[first:]}
            write_text(path, json.dumps(record, ensure_ascii=False))

    def show(self, results: Results, subject: Subject, rows: Rows) -> None:
        """Write a sheet of pictures for the page, of the first person only."""
        if subject.person == self._everyone[0].person and subject.seed == 0 and not self.only:
            save_sheet(self.out / f"{results.name}_pictures.png", rows)

    def held_out(self, subject: Subject, count: int | None = None) -> Photos:
        """The first `count` photos outside the training set; None: all."""
        return subject.test if count is None else subject.test.first(count)

    def moments(self, subject: Subject, count: int) -> tuple[Tensor, Tensor]:
        """params and traits of the first `count` held-out photos: what was drawn."""
        from convlora.integrations.eg3d.lab import people

        drawn = people.photos(subject.person, "test", count, 16)
        return drawn.params, drawn.traits

    def truth(self, subject: Subject, count: int, labels: Tensor) -> Truth:
        """The first `count` held-out moments as they are from cameras labels (V, 25)."""
        from convlora.integrations.eg3d.lab.truth import true_views

        side = self.base.img_resolution, self.base.neural_rendering_resolution
        return true_views(*self.moments(subject, count), labels.cpu(), *side)

    # ---------------------------------------------------------------------------------------------- a person's models

    def album(self, subject: Subject, count: int | None = None) -> Photos:
        """The photos to learn from: nested random subsets, others for every seed; the first `count`."""
        order = torch.randperm(len(subject.train), generator=torch.Generator().manual_seed(subject.seed))
        chosen = sorted(order[: count or self.photos].tolist())
        return subject.train.part(chosen)

    def anchors(self, subject: Subject, count: int | None = None) -> Anchors:
        """Of the photos of `album`; a photo's anchor is found once, whatever subsets it is in."""
        photos = self.album(subject, count)
        path = self.out / _slug(subject.person.name) / "anchors.safetensors"
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
                description=f"{subject.person.name}: {len(missing)} anchors",
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
        if kind.photos == self.photos:
            kind = kind._replace(photos=None)
        path = self.folder(subject) / f"{kind.label.replace(' ', '_').replace(',', '')}.safetensors"
        if not path.is_file():
            self._train(subject, kind, path)
        if kind.method == "full":
            return load_generator(path, self.device).requires_grad_(False)
        model = copy.deepcopy(self.base)
        for parameter in convlora.load_adapter(model, path).parameters():
            parameter.requires_grad_(False)
        return model

    def _train(self, subject: Subject, kind: Kind, path: Path) -> None:
        settings, photos, anchors = self.settings, self.album(subject, kind.photos), self.anchors(subject, kind.photos)
        model = copy.deepcopy(self.base)
        torch.manual_seed(subject.seed)
        groups: list[dict[str, Any]]
        if kind.method == "full":
            groups = [{"params": unfreeze(model), "lr": settings.lr_full}]
        else:
            adapter = inject_kind(model, kind)
            groups = parameter_groups(adapter, settings.lr, settings.lr_full)
        tune(
            model, photos, anchors, groups, steps=settings.steps, batch_size=settings.batch_size,
            perceptual=self.networks.perceptual, perceptual_weight=settings.perceptual_weight, seed=subject.seed,
            checkpoint=path.with_suffix(".ckpt"), progress=self.progress,
            description=f"{subject.person.name}: {kind.label}",
        )  # fmt: skip
        if kind.method == "full":
            save_generator(model.requires_grad_(False), path)
        else:
            adapter.save(path, person=subject.person.name, consent="procedural person, none needed")
        path.with_suffix(".ckpt").unlink(missing_ok=True)

    def folder(self, subject: Subject) -> Path:
        return self.out / _slug(subject.person.name) / f"seed_{subject.seed}"

    def views(self, count: int, seed: int = 0) -> Tensor:
        """(count, 25) random novel views, the same for every model."""
        return cameras.random_views(count, seed=seed, **cameras.orbit_of(self.base.rendering_kwargs))


_RECORDED = ("photos", "largest", "tests")  # more people or seeds may be added to a cohort later


def inject_kind(model: TriPlaneGenerator, kind: Kind) -> Adapter:
    """The adapter of a kind that is one, fresh on the model."""
    if kind.method != "lora":
        return convlora.inject(model, kind.method, kind.rank, targets=list(TARGETS), train=["decoder"])
    if kind.numbers_of is None:
        return inject_personal(model, kind.rank, kind.preset)
    wanted = trainables(model, Kind(kind.numbers_of, kind.rank))
    left = wanted - trainables(model, Kind(rank=kind.rank))
    ranks = {}
    for row in convlora.adaptable(model, list(TARGETS)):  # from coarse to fine
        if (more := sum(row.matrix)) <= left and row.max_rank > kind.rank:
            ranks[row.name] = kind.rank + 1
            left -= more
    return convlora.inject_lora(model, kind.rank, targets=list(TARGETS), ranks=ranks, train=["decoder"])


def trainables(model: TriPlaneGenerator, kind: Kind) -> int:
    """How many numbers an adapter of a kind trains; the model stays as it is."""
    adapter = inject_kind(model, kind)
    try:
        return adapter.num_trainable
    finally:
        adapter.remove()


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def _read_values(path: Path, effort: Effort) -> list[Value] | None:
    """None: there are none yet, or they were measured with another effort."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["effort"] != json.loads(json.dumps(asdict(effort))):
        return None
    return [Value(*value) for value in record["values"]]
