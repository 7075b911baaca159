"""Procedural people: the same photos on every run, and albums in EG3D's own format."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.lab import people, world

pytest.importorskip("numba")
Image = pytest.importorskip("PIL.Image")

SIZE = 24


def test_photos_are_reproducible_and_do_not_depend_on_how_many_are_taken():
    few, many = (people.photos(people.PERSON_A, "train", count, SIZE) for count in (3, 5))
    for a, b in zip(few, many):
        assert torch.equal(a, b[:3])
    assert few.images.shape == (3, 3, SIZE, SIZE) and few.labels.shape == (3, 25)
    assert few.params.shape == (3, world.PARAM_DIM) and few.traits.shape == (3, world.TRAIT_DIM)
    assert few.mask.shape == (3, 1, SIZE, SIZE)


def test_splits_and_people_differ_but_identity_stays():
    train, test = (people.photos(people.PERSON_A, split, 4, SIZE) for split in ("train", "test"))
    who = slice(0, world.IDENTITY_DIM)
    assert torch.equal(train.params[:, who], test.params[:, who])
    assert torch.equal(train.params[:1, who].expand(4, -1), train.params[:, who])
    assert torch.equal(train.traits, test.traits)
    assert not torch.equal(train.params[0], test.params[0]) and not torch.equal(train.labels[0], test.labels[0])
    other = people.photos(people.evaluation_people(1)[0], "train", 1, SIZE)
    assert not torch.equal(other.params[0, who], train.params[0, who])


def test_the_pictures_are_those_of_the_labels():
    shot = people.photos(people.PERSON_A, "test", 2, SIZE)
    cam2world, intrinsics = cameras.split_label(shot.labels)
    again = world.render(shot.params, shot.traits, cam2world, intrinsics[0], SIZE)
    assert torch.equal(again.image, shot.images) and torch.equal(again.mask, shot.mask)


def test_poses_stay_within_limits_and_hair_near_the_persons_own():
    labels, params, _ = people._plan(people.PERSON_A, "train", 400)
    centre = cameras.split_label(labels)[0][:, :3, 3] / 2.7
    pitch, yaw = centre[:, 1].asin(), torch.atan2(centre[:, 0], centre[:, 2])
    assert yaw.abs().max() <= 0.5 + 1e-4 and pitch.abs().max() <= 0.25 + 1e-4
    # 400 draws: a deviation has a relative standard error of 3.5 %; clipping takes another 3 %.
    assert abs(yaw.std() / 0.22 - 1) < 0.15 and abs(pitch.std() / 0.1 - 1) < 0.15
    at = world.PARAM_NAMES.index
    assert params[:, at("hair_length")].std() < 0.2 and params[:, at("smile")].std() > 0.8


def test_person_a_has_rare_lasting_traits_and_a_reserved_seed():
    row = dict(zip(world.TRAIT_NAMES, people.PERSON_A.trait_row().tolist()))
    for name in ("birthmark_size", "birthmark_darkness", "eye_asymmetry", "mouth_asymmetry", "long_nose", "heavy_brow"):
        assert row[name] >= 0.4
    assert all(row[name] == 0 for name in world.OCCLUDER_TRAITS)
    seeds = [people.PERSON_A.seed, *(person.seed for person in people.evaluation_people(40))]
    assert len(set(seeds)) == 41 and min(seeds) >= people.EVAL_SEEDS


def test_the_birthmark_is_seen_on_the_cheek():
    person = people.PERSON_A
    params = torch.cat([person.identity(), world.sample_nuisance(person.seed)[0]])[None]
    front = cameras.look_at(math.pi / 2, math.pi / 2)
    marked = person.trait_row()[None]
    plain = marked.clone()
    plain[:, world.TRAIT_NAMES.index("birthmark_darkness")] = 0
    shown, hidden = (world.render(params, traits, front, None, 64).image for traits in (marked, plain))
    difference = shown - hidden
    changed = difference.abs().amax(1)[0] > 0.1
    assert 8 < changed.sum() < 80  # about 4 pixels across at 64
    assert changed.nonzero()[:, 1].min() > 32 and (difference[0, :, changed] < 0).float().mean() > 0.95


def test_an_album_on_disk_holds_the_same_photos(tmp_path):
    folder = people.write_album(people.PERSON_A, tmp_path / "a", train=3, test=2, resolution=SIZE)
    manifest = json.loads((folder / "manifest.json").read_text())
    labels = dict(json.loads((folder / "dataset.json").read_text())["labels"])
    assert manifest["procedural"] is True and manifest["seed"] == people.PERSON_A.seed
    assert "no human being" in manifest["consent"]
    assert manifest["traits"]["birthmark_x"] == pytest.approx(0.8)
    listed = [name for split in ("train", "test") for name in manifest["split"][split]]
    assert sorted(labels) == sorted(listed) == sorted(file.name for file in folder.glob("*.png"))
    for split, count in (("train", 3), ("test", 2)):
        shot = people.photos(people.PERSON_A, split, count, SIZE)
        for image, label, name in zip(shot.images, shot.labels, manifest["split"][split]):
            stored = torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1) / 127.5 - 1
            assert (stored - image).abs().max() <= 0.5 / 127.5 + 1e-6  # rounding to 8 bits
            assert torch.equal(torch.tensor(labels[name]), label)
    with pytest.raises(ConvloraError, match="nothing is overwritten"):
        people.write_album(people.PERSON_A, folder)


def test_errors_say_what_to_do():
    with pytest.raises(ConvloraError, match="one of train, test"):
        people.photos(people.PERSON_A, "validation", 1, SIZE)
    with pytest.raises(ConvloraError, match="glasses.*lasting traits"):
        people.Person("x", 1, {"glasses": 1.0})
