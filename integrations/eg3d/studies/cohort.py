"""The people of a study and their models, made when first asked for and kept on disk, so that a study resumes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import convlora
from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.album import Photos, load_album
from convlora.integrations.eg3d.anchors import Anchors, find_anchors
from convlora.integrations.eg3d.checkpoint import load_generator, save_generator
from convlora.integrations.eg3d.demo import LAB_SETTINGS
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.networks import lab_networks
from convlora.integrations.eg3d.personalize import TARGETS, inject_personal, parameter_groups, tune, unfreeze
from convlora.integrations.eg3d.pipeline import Networks, Settings
from convlora.integrations.eg3d.run_folder import RunFolder
from convlora.integrations.eg3d.tasks.hull import Hull, make_hull


class Kind(NamedTuple):
    """A way to make a person's model: "pretrained" (not at all), "full", or a method of the adapter library."""

    method: str = "lora"
    rank: int = 1
    photos: int | None = None  # of the album; None: the cohort's number

    @property
    def label(self) -> str:
        if self.method in ("pretrained", "full"):
            return {"pretrained": "pretrained", "full": "full fine-tuning"}[self.method]
        name = "LoRA" if self.method == "lora" else self.method
        return f"{name} rank {self.rank}" + ("" if self.photos is None else f", {self.photos} photos")


PRETRAINED, FULL, LORA = Kind("pretrained"), Kind("full"), Kind()


class Subject(NamedTuple):
    """One person in one repetition: what every study measures with."""

    person: Any  # lab.Person
    seed: int
    train: Photos
    test: Photos
    reference: Tensor  # identity embeddings (K, D) of all photos outside the test set


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
        return [self._subject(person, seed) for person in people for seed in range(self.seeds)]

    def _subject(self, person: Any, seed: int) -> Subject:
        from convlora.integrations.eg3d import lab

        folder = self.out / person.name.replace(" ", "_") / "album"
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

    # ---------------------------------------------------------------------------------------------- a person's models

    def album(self, subject: Subject, count: int | None = None) -> Photos:
        """The photos to learn from: nested random subsets, others for every seed; the first `count`."""
        order = torch.randperm(len(subject.train), generator=torch.Generator().manual_seed(subject.seed))
        chosen = sorted(order[: count or self.photos].tolist())
        train = subject.train
        return Photos(train.images[chosen], train.labels[chosen], [train.names[i] for i in chosen])

    def anchors(self, subject: Subject, count: int | None = None) -> Anchors:
        photos = self.album(subject, count)
        path = self.folder(subject) / f"anchors_{len(photos)}.safetensors"
        if path.is_file() and (kept := Anchors.load(path)).names == photos.names:
            return kept  # complete: neither photos nor statistics of w need to be looked at again
        settings = self.settings
        return find_anchors(
            self.base, photos, settings.anchor_steps, init=self.networks.encoder or "mean",
            perceptual=self.networks.perceptual, perceptual_weight=settings.perceptual_weight, lr=settings.anchor_lr,
            seed=subject.seed, checkpoint=path, progress=self.progress,
            description=f"{subject.person.name}: {len(photos)} anchors",
        )  # fmt: skip

    def hull(self, subject: Subject, dilation: float = 2.0) -> Hull:
        return make_hull(self.anchors(subject).w.to(self.device), dilation)

    def model(self, subject: Subject, kind: Kind) -> TriPlaneGenerator:
        """The person's generator, frozen; trained now if its file is not there."""
        if kind.method == "pretrained":
            return self.base
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
            if kind.method == "lora":
                adapter = inject_personal(model, kind.rank)
            else:
                adapter = convlora.inject(model, kind.method, kind.rank, targets=list(TARGETS), train=["decoder"])
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
        return self.out / subject.person.name.replace(" ", "_") / f"seed_{subject.seed}"

    def views(self, count: int, seed: int = 0) -> Tensor:
        """(count, 25) random novel views, the same for every model."""
        return cameras.random_views(count, seed=seed, **cameras.orbit_of(self.base.rendering_kwargs))


_RECORDED = ("photos", "largest", "tests")  # more people or seeds may be added to a cohort later
