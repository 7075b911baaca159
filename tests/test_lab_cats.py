"""The lab's second species: cats that are drawn as people are, their prior and the networks that know them."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras, load_generator
from convlora.integrations.eg3d.lab import networks, people, world
from convlora.integrations.eg3d.lab._species import CATS, PEOPLE, species
from convlora.integrations.eg3d.lab._training import orbit
from convlora.integrations.eg3d.metrics import load_identity, psnr
from convlora.integrations.eg3d.networks import choose_networks

pytest.importorskip("numba")
pytest.importorskip("PIL.Image")

DATA = Path(str(files("convlora.integrations.eg3d.lab") / "data"))
FRONT = cameras.look_at(math.pi / 2, math.pi / 2)
CAT = people.evaluation_people(1, "cats")[0]


def rows(seeds: list[int]) -> torch.Tensor:
    return torch.cat([world.sample_identity(seeds), world.sample_nuisance(seeds)], 1)


def trait_row(**values: float) -> torch.Tensor:
    return torch.tensor([[values.get(name, 0.0) for name in CATS.trait_names]])


def show(params: torch.Tensor, traits: torch.Tensor | None = None, yaw: float = 0.0) -> torch.Tensor:
    camera = orbit(torch.tensor([yaw]), torch.tensor([0.1])).expand(len(params), 4, 4)
    return world.render(params, traits, camera, None, 64, 2, CATS).image


def test_a_species_has_the_numbers_of_the_others_and_shares_light_and_background():
    for names in (CATS.param_names, CATS.trait_names):
        assert len(set(names)) == len(names)
    assert len(CATS.identity_names) == world.IDENTITY_DIM and len(CATS.param_names) == world.PARAM_DIM
    assert len(CATS.trait_names) == world.TRAIT_DIM
    shared = [name for name in PEOPLE.param_names if name.startswith(("light", "ambient", "background"))]
    assert len(shared) == 8
    assert all(CATS.param_names.index(name) == PEOPLE.param_names.index(name) for name in shared)
    for kind in (PEOPLE, CATS):
        assert set(kind.habits) | set(kind.sided) <= set(kind.nuisance_names)
    assert species("cats") is CATS and species(PEOPLE) is PEOPLE
    with pytest.raises(ConvloraError, match="no 'dogs'; its species are people, cats"):
        species("dogs")


def test_people_are_what_is_drawn_unless_a_species_is_named():
    seeds = list(range(40))
    assert torch.equal(world.sample_traits(seeds), world.sample_traits(seeds, "people"))
    person = people.evaluation_people(1)[0]
    assert person.species == "people" and person.name == "Person 900100"
    assert CAT.species == "cats" and CAT.name == "Cat 900100" and CAT.seed == person.seed
    params = rows([1])
    person_drawn = world.render(params, None, FRONT, None, 24)
    assert torch.equal(person_drawn.image, world.render(params, None, FRONT, None, 24, species="people").image)
    assert not torch.equal(person_drawn.image, world.render(params, None, FRONT, None, 24, species="cats").image)


def test_photos_of_a_cat_are_reproducible_and_show_one_cat():
    few, many = (people.photos(CAT, "train", count, 24) for count in (2, 4))
    for a, b in zip(few, many):
        assert torch.equal(a, b[:2])
    test = people.photos(CAT, "test", 4, 24)
    who = slice(0, world.IDENTITY_DIM)
    assert torch.equal(many.params[:, who], test.params[:, who]) and torch.equal(many.traits, test.traits)
    assert not torch.equal(many.params[0], test.params[0])
    _, params, _ = people._plan(CAT, "train", 200)
    at = CATS.param_names.index
    assert params[:, at("collar_hue")].std() < 0.2 and params[:, at("squint")].std() > 0.8


def test_an_album_of_a_cat_says_so(tmp_path):
    folder = people.write_album(CAT, tmp_path / "cat", train=2, test=1, resolution=24)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["species"] == "cats" and "cat" in manifest["consent"] and manifest["procedural"] is True
    assert set(manifest["traits"]) <= set(CATS.trait_names) and len(list(folder.glob("*.png"))) == 3
    other = people.write_album(people.PERSON_A, tmp_path / "person", train=1, test=0, resolution=24)
    assert "species" not in json.loads((other / "manifest.json").read_text())


def test_rays_end_on_the_surface_and_the_mask_is_the_head():
    params = rows(list(range(4)))
    cam2world = orbit(torch.tensor([-0.4, -0.1, 0.2, 0.4]), torch.tensor([0.2, -0.1, 0.0, 0.1]))
    origins, directions = world.pixel_rays(cam2world, None, 32)
    seen = world.trace(params, None, origins, directions, "cats")
    points = origins[:, None] + directions * seen.depth[..., None]
    distance = world.sdf(params, None, points, "cats")
    hit = seen.part > 0
    assert hit.float().mean() > 0.2
    assert distance[hit].abs().max() < 3e-3  # the tracer stops at 3e-4, at grazing rays at 2.5e-3
    assert (distance[~hit] > 0).all()
    before = origins[:, None] + directions * (seen.depth - 0.02)[..., None]
    assert (world.sdf(params, None, before, "cats")[hit] > -5e-3).float().mean() > 0.99
    photo = world.render(params, None, cam2world, None, 32, 1, "cats")
    head = ((seen.part > 0) & (seen.part != 5)).float().view(4, 1, 32, 32)
    assert torch.equal(photo.mask, head) and (seen.part == 5).any()  # chest and collar are outside the mask


def test_landmarks_are_eyes_nose_and_mouth():
    params = rows(list(range(8)))
    params[:, CATS.param_names.index("squint")] = 0
    params[:, CATS.param_names.index("mouth_open")] = -1
    points = world.anchors3d(params, None, "cats")
    origins = FRONT[:, :3, 3].expand(8, 3)
    directions = torch.nn.functional.normalize(points - origins[:, None], dim=-1)
    seen = world.trace(params, None, origins, directions, CATS)
    assert (seen.part[:, :2] == 2).all()
    torch.testing.assert_close(seen.depth, (points - origins[:, None]).norm(dim=-1), atol=4e-3, rtol=0)
    pixels = world.landmarks(params, None, FRONT.expand(8, 4, 4), None, CATS)
    assert (pixels[:, 0, 0] < 0.5).all() and (pixels[:, 1, 0] > 0.5).all()
    assert (pixels[:, 2, 1] > pixels[:, :2, 1].amax(1)).all() and (pixels[:, 3:, 1] > pixels[:, 2:3, 1]).all()


def test_every_number_and_every_trait_is_seen():
    base = torch.zeros(1, world.PARAM_DIM)
    for name, value in dict(stripes=0.3, white_muzzle=0.5, bib=1.0, mouth_open=2.0, tongue=0.5, points=0.5).items():
        base[0, CATS.param_names.index(name)] = value
    moved = base + 1.5 * torch.eye(world.PARAM_DIM)
    change = (show(moved, yaw=0.35) - show(base, yaw=0.35)).abs().amax(1).flatten(1)
    unseen = {name: most for name, most in zip(CATS.param_names, change.amax(1).tolist()) if most < 0.04}
    assert not unseen
    patch = dict(patch_x=0.6, patch_y=0.5, patch_size=0.8, patch_darkness=0.9)
    marked = torch.cat([trait_row(**(patch if name.startswith("patch") else {name: 0.8})) for name in CATS.trait_names])
    plain = torch.zeros(1, world.PARAM_DIM)
    change = (show(plain.expand(len(marked), -1), marked) - show(plain)).abs().amax(1).flatten(1)
    unseen = [name for name, found in zip(CATS.trait_names, (change > 0.15).sum(1).tolist()) if found < 4]
    assert not unseen


def test_a_mirror_turns_the_sided_numbers():
    params = rows(list(range(6)))
    yaw, pitch = torch.linspace(-0.3, 0.3, 6), torch.zeros(6)
    sign = torch.tensor([-1.0 if name in CATS.sided else 1.0 for name in CATS.param_names])
    drawn = world.render(params, None, orbit(yaw, pitch), None, 64, 2, CATS).image
    mirrored = world.render(params * sign, None, orbit(-yaw, pitch), None, 64, 2, CATS).image.flip(3)
    unturned = world.render(params, None, orbit(-yaw, pitch), None, 64, 2, CATS).image.flip(3)
    right, wrong = ((other - drawn).abs().mean() for other in (mirrored, unturned))
    assert right < 0.012 and wrong > 3 * right  # the mottling of the fur and the eyes' light are not mirrored


def test_a_cats_traits_are_checked():
    with pytest.raises(ConvloraError, match="unibrow.*lasting traits of the lab's cats; choose from patch_x"):
        people.Person("x", 1, {"unibrow": 1.0}, "cats")
    with pytest.raises(ConvloraError, match="no 'dogs'"):
        people.Person("x", 1, species="dogs")
    shown = people.Person("Tom", 5, {"odd_eyes": 1.0}, "cats").trait_row()
    assert shown.sum() == 1 and shown[CATS.trait_names.index("odd_eyes")] == 1


def test_attributes_carry_the_species_names():
    labels = world.attributes(rows([1, 2]), None, "cats")
    assert list(labels) == [*CATS.param_names, *CATS.trait_names] and labels["stripes"].shape == (2,)


# ---- the prior of cats and the networks that know them


def test_the_prior_of_cats_draws_unseen_cats_and_the_one_of_people_does_not():
    from convlora.integrations.eg3d.lab.train_prior import judge

    G = load_generator("lab-cats")
    assert G.config == load_generator("lab").config
    cats, others = judge(G, None, 4, "cats"), judge(load_generator("lab"), None, 4, "cats")
    assert cats["psnr_head"] > 18 and cats["psnr_head"] > others["psnr_head"] + 3
    assert cats["psnr_image"] > 21.5


@pytest.mark.parametrize("part, limit", [("prior", 4_100_000), ("perceptual", 1_500_000), ("identity", 3_000_000)])
def test_files_are_small_and_say_how_they_were_made(part, limit):
    name = networks.file_name(part, "cats")
    assert name == f"{part}_cats" and (DATA / f"{name}.safetensors").stat().st_size <= limit
    facts = json.loads((DATA / f"{name}.json").read_text())
    assert facts["procedural"] is True and "--species cats" in facts["command"]
    assert {"seed", "date", "machine", "hours", "steps", "started_from"} <= facts.keys()


@pytest.fixture(scope="module")
def herd() -> dict[str, torch.Tensor]:
    """Twelve unseen cats, three photos each: other expression, light and pose every time."""
    count, each = 12, 3
    identity = world.sample_identity(list(range(810_000, 810_000 + count))).repeat(each, 1)
    params = torch.cat([identity, world.sample_nuisance(list(range(820_000, 820_000 + count * each)))], 1)
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(2, count * each, generator=generator) - 0.5
    cam2world = orbit(0.7 * spread[0], 0.3 * spread[1])
    images = world.render(params, None, cam2world, None, 64, 2, CATS).image
    label = cameras.label(cam2world)
    return {"images": images, "params": params, "labels": label, "cat": torch.arange(count).repeat(each)}


def test_identity_separates_unseen_cats(herd):
    net = load_identity("lab-cats")
    assert net.name == "lab-cats"
    units = net(herd["images"], None)
    cosines, cat = units @ units.T, herd["cat"]
    upper = torch.ones_like(cosines, dtype=torch.bool).triu(1)
    same, other = cosines[(cat[:, None] == cat) & upper], cosines[(cat[:, None] != cat) & upper]
    assert (same[:, None] > other).float().mean() > 0.95


def test_the_encoder_starts_an_inversion_closer_than_the_mean(herd):
    given, _ = choose_networks("lab-cats")
    assert given.perceptual.name == given.identity.name == "lab-cats"
    images, labels = herd["images"][:4], herd["labels"][:4]
    G = load_generator("lab-cats")
    found = given.encoder(images, labels)
    mean = G.backbone.mapping.w_avg.expand_as(found)
    drawn = [
        G.synthesis(w[:, None].expand(-1, G.backbone.num_ws, -1), labels, noise_mode="const", deterministic=True)[
            "image"
        ]
        for w in (found, mean)
    ]
    close, far = (psnr(torch.nn.functional.avg_pool2d(image, 2), images) for image in drawn)
    assert (close > far + 2).all()
