"""Procedural people, or cats, and their photo albums, the same on every run and machine.

A person is a seed: identity numbers and lasting traits are fixed by it, hair is nearly so, and expression, light,
background and pose differ from photo to photo. Seeds from EVAL_SEEDS on belong to the people that results are
measured on; scripts that train weights stay below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convlora.errors import ConvloraError

from .. import cameras
from . import world
from ._species import PEOPLE, Species
from ._species import species as species_of

EVAL_SEEDS = 900_000
SPLITS = {"train": 10, "test": 11}  # numbers of the random streams, apart from those of world's samplers

# Standard deviations and limits of a photo's camera, radians.
YAW, YAW_LIMIT = 0.22, 0.5
PITCH, PITCH_LIMIT = 0.1, 0.25

# What stays close to a person's own value from photo to photo, with the standard deviation it varies by.
HABITS = PEOPLE.habits
CONSENT = PEOPLE.consent


@dataclass(frozen=True)
class Person:
    """Who is photographed. `traits` names lasting traits and their values; None draws them from the seed."""

    name: str
    seed: int
    traits: Mapping[str, float] | None = None
    species: str = "people"

    def __post_init__(self) -> None:
        lasting = self.kind.lasting_traits
        unknown = sorted(set(self.traits or ()) - set(lasting))
        if unknown:
            who = "a person" if self.kind is PEOPLE else f"the lab's {self.species}"
            raise ConvloraError(f"{unknown} are not lasting traits of {who}; choose from {', '.join(lasting)}")

    @property
    def kind(self) -> Species:
        return species_of(self.species)

    def identity(self) -> Tensor:
        """The person's identity numbers, (IDENTITY_DIM,)."""
        return world.sample_identity(self.seed)[0]

    def trait_row(self) -> Tensor:
        """The person's lasting traits, (TRAIT_DIM,); occluders are 0."""
        if self.traits is not None:
            return torch.tensor([float(self.traits.get(name, 0.0)) for name in self.kind.trait_names])
        lasting = torch.tensor([float(name in self.kind.lasting_traits) for name in self.kind.trait_names])
        return world.sample_traits(self.seed, self.kind)[0] * lasting


PERSON_A = Person(
    "Person A",
    EVAL_SEEDS + 10,
    {
        "birthmark_x": 0.80, "birthmark_y": 0.0, "birthmark_size": 0.8, "birthmark_darkness": 0.95,
        "eye_asymmetry": 0.8, "mouth_asymmetry": 0.8, "long_nose": 0.8, "long_chin": 0.9,
        "unibrow": 0.8, "heavy_brow": 0.9, "streak": 0.9,
    },
)  # fmt: skip


def evaluation_people(count: int, species: str | Species = "people") -> list[Person]:
    """The first `count` people results are measured on besides Person A; their lasting traits come from their seeds.

    With `species` "cats" they are cats of the same seeds.
    """
    kind = species_of(species)
    seeds = range(EVAL_SEEDS + 100, EVAL_SEEDS + 100 + count)
    return [Person(f"{kind.individual} {seed}", seed, None, kind.name) for seed in seeds]


class Photos(NamedTuple):
    """images (N, 3, R, R) in [-1, 1], labels (N, 25), params (N, PARAM_DIM), traits (N, TRAIT_DIM), mask as images."""

    images: Tensor
    labels: Tensor
    params: Tensor
    traits: Tensor
    mask: Tensor


def _plan(person: Person, split: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N, 25), params and traits of a person's first `count` photos of a split."""
    if split not in SPLITS:
        raise ConvloraError(f"split is {split!r}; one of {', '.join(SPLITS)}")
    if count < 1:
        raise ConvloraError(f"count must be at least 1, got {count}")
    # A generator per photo, so that photo 7 is the same in an album of 10 and of 50.
    draws = np.stack(
        [
            np.random.default_rng(np.random.SeedSequence([person.seed, SPLITS[split], index])).standard_normal(
                world.NUISANCE_DIM + 2
            )
            for index in range(count)
        ]
    )
    nuisance = torch.from_numpy(draws[:, 2:].astype(np.float32))
    own = world.sample_nuisance(person.seed)[0]
    for name, spread in person.kind.habits.items():
        at = person.kind.nuisance_names.index(name)
        nuisance[:, at] = own[at] + spread * nuisance[:, at]
    yaw, pitch = torch.from_numpy(draws[:, :2].astype(np.float32)).unbind(1)
    yaw = (YAW * yaw).clamp(-YAW_LIMIT, YAW_LIMIT)
    pitch = (PITCH * pitch).clamp(-PITCH_LIMIT, PITCH_LIMIT)
    labels = cameras.label(cameras.look_at(math.pi / 2 + yaw, cameras.vertical_angle(pitch)))
    params = torch.cat([person.identity().expand(count, -1), nuisance], 1)
    return labels, params, person.trait_row().repeat(count, 1)


def photos(person: Person, split: str = "train", count: int = 50, resolution: int = 128) -> Photos:
    """The first `count` photos of a person's "train" or "test" split, drawn at resolution²."""
    labels, params, traits = _plan(person, split, count)
    cam2world, _ = cameras.split_label(labels)
    drawn = world.render(params, traits, cam2world, None, resolution, species=person.kind)
    return Photos(drawn.image, labels, params, traits, drawn.mask)


def write_album(person: Person, folder: str | Path, train: int = 50, test: int = 12, resolution: int = 128) -> Path:
    """Write a person's photos as PNGs, their cameras as EG3D's dataset.json, and manifest.json; returns the folder.

    dataset.json lists every photo; manifest.json names the files of each split, so that held-out photos are not
    trained on by accident. The folder must be new or empty.
    """
    from PIL import Image

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConvloraError(f"{folder} exists and is not an empty folder: choose a new one, nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    labels: list[tuple[str, list[float]]] = []
    files: dict[str, list[str]] = {}
    for split, count in (("train", train), ("test", test)):
        files[split] = []
        if count == 0:
            continue
        shot = photos(person, split, count, resolution)
        pixels = ((shot.images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for index, (image, label) in enumerate(zip(pixels, shot.labels.tolist())):
            name = f"{split}_{index:03d}.png"
            Image.fromarray(image).save(folder / name)
            files[split].append(name)
            labels.append((name, label))
    manifest = {
        "person": person.name,
        "seed": person.seed,
        "traits": {name: value for name, value in zip(person.kind.trait_names, person.trait_row().tolist()) if value},
        "procedural": True,
        "resolution": resolution,
        "split": files,
        "consent": person.kind.consent,
    }
    if person.kind is not PEOPLE:
        manifest["species"] = person.species
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return folder
