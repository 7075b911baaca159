"""The procedural head world: reproducible, geometrically consistent, and editable where its names say."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from convlora.errors import ConvloraError
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.lab import world

pytest.importorskip("numba")

SEEDS = list(range(6))
FRONT = cameras.look_at(math.pi / 2, math.pi / 2)


def rows(seeds: list[int]) -> torch.Tensor:
    return torch.cat([world.sample_identity(seeds), world.sample_nuisance(seeds)], 1)


def with_value(params: torch.Tensor, name: str, value: float) -> torch.Tensor:
    changed = params.clone()
    changed[:, world.PARAM_NAMES.index(name)] = value
    return changed


def trait(**values: float) -> torch.Tensor:
    return torch.tensor([[values.get(name, 0.0) for name in world.TRAIT_NAMES]])


def towards(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays from the frontal camera to points (N, K, 3)."""
    origin = FRONT[:, :3, 3].expand(len(points), 3)
    return origin, torch.nn.functional.normalize(points - origin[:, None], dim=-1)


def test_names_and_dimensions_agree():
    assert len(set(world.PARAM_NAMES)) == world.PARAM_DIM == world.IDENTITY_DIM + world.NUISANCE_DIM
    assert world.PARAM_NAMES == world.IDENTITY_NAMES + world.NUISANCE_NAMES
    assert len(set(world.TRAIT_NAMES)) == world.TRAIT_DIM
    assert set(world.IDENTITY_TRAITS) | set(world.OCCLUDER_TRAITS) == set(world.TRAIT_NAMES)
    assert world.sample_identity(3).shape == (1, world.IDENTITY_DIM)
    assert world.sample_nuisance(SEEDS).shape == (6, world.NUISANCE_DIM)
    assert world.sample_traits(SEEDS).shape == (6, world.TRAIT_DIM)


def test_samples_depend_on_their_own_seed_only():
    assert torch.equal(world.sample_identity(SEEDS)[4:5], world.sample_identity(4))
    assert torch.equal(world.sample_nuisance(SEEDS)[4:5], world.sample_nuisance(4))
    assert torch.equal(world.sample_traits(SEEDS)[4:5], world.sample_traits(4))
    assert not torch.equal(world.sample_identity(4), world.sample_identity(5))


def test_identity_and_nuisance_streams_are_standard_and_independent():
    seeds = list(range(4000))
    who, how = world.sample_identity(seeds), world.sample_nuisance(seeds)
    for values in (who, how):
        # 4000 draws: a mean has standard error 0.016, a deviation 0.011; five of them are allowed.
        assert values.mean(0).abs().max() < 0.08 and (values.std(0) - 1).abs().max() < 0.06
    correlation = (who - who.mean(0)).T @ (how - how.mean(0)) / len(seeds)
    assert correlation.abs().max() < 0.09  # largest of about 800 correlations of standard error 0.016
    assert world.sample_traits(seeds).count_nonzero() / (4000 * world.TRAIT_DIM) < 0.35


def test_rendering_is_deterministic_and_a_photo_does_not_depend_on_its_batch():
    params, traits = rows(SEEDS), world.sample_traits(SEEDS)
    poses = FRONT.expand(6, 4, 4)
    first, again = world.render(params, traits, poses, None, 24), world.render(params, traits, poses, None, 24)
    alone = world.render(params[2:3], traits[2:3], FRONT, None, 24)
    for a, b, c in zip(first, again, alone):
        assert torch.equal(a, b) and torch.equal(a[2:3], c)


def test_shapes_and_ranges_of_a_photo():
    image, depth, mask = world.render(rows(SEEDS), None, FRONT.expand(6, 4, 4), None, 32)
    assert image.shape == (6, 3, 32, 32) and depth.shape == mask.shape == (6, 1, 32, 32)
    assert image.min() >= -1 and image.max() <= 1 and image.isfinite().all()
    assert depth.min() > 2.25 and depth.max() < 3.3  # the span EG3D's rays are sampled in
    assert mask.min() == 0 and mask.max() == 1 and bool((mask[:, :, 16, 16] == 1).all())


def test_the_world_lies_within_its_sphere_and_misses_end_on_the_backdrop():
    origins, rays = world.pixel_rays(FRONT.expand(6, 4, 4), None, 48)
    seen = world.trace(rows(SEEDS), None, origins, rays)
    radius = (origins[:, None] + rays * seen.depth[..., None]).norm(dim=-1)
    solid = seen.part > 0
    assert radius[solid].max() < 0.47
    assert torch.allclose(radius[~solid], torch.full_like(radius[~solid], 0.49), atol=1e-5)
    aside = torch.nn.functional.normalize(torch.tensor([[[0.5, 0.0, -1.0]]]), dim=-1)  # passes the sphere by
    missed = world.trace(rows([0]), None, FRONT[:, :3, 3], aside)
    assert missed.depth.isfinite().all() and missed.part.item() == 0


def test_distance_is_negative_inside_positive_outside_and_zero_where_rays_end():
    params, traits = rows(SEEDS), world.sample_traits(SEEDS)
    inside = torch.tensor([[0.0, 0.05, 0.0], [0.0, -0.1, 0.03], [0.0, -0.25, -0.04]]).expand(6, 3, 3)
    outside = torch.tensor([[0.0, 0.45, 0.0], [0.4, 0.1, 0.0], [0.0, 0.0, 0.35]]).expand(6, 3, 3)
    assert (world.sdf(params, traits, inside) < 0).all()
    assert (world.sdf(params, traits, outside) > 0).all()
    origins, rays = world.pixel_rays(FRONT.expand(6, 4, 4), None, 48)
    seen = world.trace(params, traits, origins, rays)
    ends = origins[:, None] + rays * seen.depth[..., None]
    distance = world.sdf(params, traits, ends).abs()
    solid = seen.part > 0
    # 3e-4 ends a march, float32 depth adds 2e-7; only rays that graze an edge run out of steps further away.
    assert distance[solid].quantile(0.99) < 4e-4
    assert world.sdf(params, traits, ends)[~solid].min() > 0


def test_depth_agrees_between_cameras():
    params = rows([3])
    origins, rays = world.pixel_rays(FRONT, None, 32)
    front = world.trace(params, None, origins, rays)
    points = (origins[:, None] + rays * front.depth[..., None])[front.part == 1][None]
    side = cameras.look_at(math.pi / 2 + 0.15, math.pi / 2)[:, :3, 3]
    gap = points - side[:, None]
    again = world.trace(params, None, side, torch.nn.functional.normalize(gap, dim=-1))
    seen = (again.depth - gap.norm(dim=-1)).abs() < 2e-3
    assert seen.float().mean() > 0.85  # the rest is hidden from the side
    # One point has one colour from every camera: nothing in the light follows the viewer. The two marches stop
    # up to 3e-4 apart, which at painted edges (about 2e-3 wide) moves a colour by a good tenth; hence the quantile.
    change = (again.rgb - front.rgb[front.part == 1][None]).abs().amax(-1)[seen]
    assert change.quantile(0.9) < 0.02


def test_landmarks_fall_on_eyes_nose_and_mouth():
    params = rows(list(range(40)))
    anchors = world.anchors3d(params, None)
    seen = world.trace(params, None, *towards(anchors))
    assert (seen.part[:, :2] == 2).all()
    assert (seen.part[:, 2:] == 1).all()
    assert torch.allclose(seen.depth, (anchors - FRONT[0, :3, 3]).norm(dim=-1), atol=2e-3)
    assert (anchors[:, 0, 0] < 0).all() and (anchors[:, 1, 0] > 0).all()
    assert (anchors[:, 2, 2] > anchors[:, :2, 2].amax(1)).all()  # the nose leads


@pytest.mark.parametrize("yaw", [-0.4, 0.0, 0.4])
def test_landmarks_project_through_the_same_camera_as_pixels(yaw):
    pose, side = cameras.look_at(math.pi / 2 + yaw, 1.5), 256
    marks = world.landmarks(rows([5]), None, pose, None)
    origins, rays = world.pixel_rays(pose, None, side)
    anchors = world.anchors3d(rows([5]), None)
    direction = torch.nn.functional.normalize(anchors - origins[:, None], dim=-1)
    nearest = (direction[:, :, None].double() - rays[:, None].double()).square().sum(-1).argmin(-1)
    pixel = torch.stack([nearest % side + 0.5, nearest // side + 0.5], -1) / side
    assert (marks - pixel).abs().max() <= 0.51 / side + 2e-4  # half a pixel, of float32 rays


def test_intrinsics_zoom():
    narrow = torch.tensor([[8.5294, 0, 0.5], [0, 8.5294, 0.5], [0, 0, 1]])
    usual = world.landmarks(rows([1]), None, FRONT, None) - 0.5
    assert torch.allclose(world.landmarks(rows([1]), None, FRONT, narrow) - 0.5, 2 * usual, atol=1e-5)


def test_attributes_follow_the_parameters():
    params = with_value(rows(SEEDS), "smile", 2.0)
    labels = world.attributes(params, trait(glasses=1.0).expand(6, -1))
    assert set(labels) == set(world.PARAM_NAMES) | set(world.TRAIT_NAMES)
    assert torch.allclose(labels["smile"], torch.tensor(2.0 / 2).tanh().expand(6))
    assert (labels["glasses"] == 1).all() and (labels["scar"] == 0).all()


def test_an_open_mouth_shows_its_inside_and_a_smile_raises_the_corners():
    params = with_value(rows([0]), "smile", 0.0)
    origins, rays = world.pixel_rays(FRONT, None, 96)
    shut = world.trace(with_value(params, "mouth_open", -2.0), None, origins, rays).part
    wide = world.trace(with_value(params, "mouth_open", 3.0), None, origins, rays).part
    assert (shut == 4).sum() == 0 and (wide == 4).sum() > 20
    low, high = (world.anchors3d(with_value(params, "smile", s), None)[0, 3:] for s in (-2.0, 2.0))
    assert (high[:, 1] > low[:, 1] + 0.005).all() and high[1, 0] > low[1, 0]


@pytest.mark.parametrize(
    ("marks", "centre", "radius"),
    [
        (dict(birthmark_x=0.8, birthmark_size=0.7, birthmark_darkness=0.9), (0.076, -0.045), 0.05),
        (dict(scar=1.0), (0.09, -0.03), 0.13),
        (dict(eye_patch=1.0), (0.062, 0.01), 0.12),
        (dict(unibrow=1.0), (0.0, 0.055), 0.06),
        (dict(mouth_asymmetry=1.0), (0.0, -0.11), 0.12),
    ],
)
def test_a_trait_changes_pixels_where_it_sits_and_nowhere_else(marks, centre, radius):
    params, side = with_value(rows([3]), "hair_fringe", -2.0), 96
    origins, rays = world.pixel_rays(FRONT, None, side)
    bare, marked = (world.trace(params, traits, origins, rays) for traits in (None, trait(**marks)))
    moved = (bare.rgb - marked.rgb).abs().amax(-1)[0] > 0.03
    points = (origins[:, None] + rays * bare.depth[..., None])[0]
    far = (points[:, :2] - torch.tensor(centre)).norm(dim=-1) > radius
    assert moved.sum() > 8
    assert not (moved & far).any()


def test_glasses_are_occluders_and_zero_traits_are_none():
    params = rows([2])
    origins, rays = world.pixel_rays(FRONT, None, 64)
    bare = world.trace(params, None, origins, rays)
    assert (bare.part == 6).sum() == 0
    assert (world.trace(params, trait(glasses=1.0), origins, rays).part == 6).sum() > 30
    zero = world.trace(params, trait(), origins, rays)
    assert all(torch.equal(a, b) for a, b in zip(bare, zero))


def test_people_look_different_and_every_parameter_shows():
    params = torch.zeros(1, world.PARAM_DIM)
    for name in world.PARAM_NAMES:
        moved = [world.render(with_value(params, name, v), None, FRONT, None, 64, 1).image for v in (-2.5, 2.5)]
        assert (moved[0] - moved[1]).abs().amax() > 0.05, name
    people = world.render(rows(SEEDS), None, FRONT.expand(6, 4, 4), None, 64, 1).image
    apart = (people[:, None] - people[None]).abs().mean((2, 3, 4))
    assert apart[~torch.eye(6, dtype=torch.bool)].min() > 0.05


def test_latents_start_with_the_parameters_and_have_unit_rms():
    params = rows(SEEDS)
    z = world.z_from_params(params, seed=7)
    assert z.shape == (6, 96) and torch.equal(z[:, : world.PARAM_DIM], params)
    assert torch.allclose(z.square().mean(1), torch.ones(6), atol=1e-5)
    assert torch.equal(z, world.z_from_params(params, seed=7))
    with pytest.raises(ConvloraError, match="shrink the row or use a larger z_dim"):
        world.z_from_params(params * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world.render(torch.zeros(1, 3), None, FRONT, None, 8), r"params must be \(N, 59\), got \(1, 3\)"),
        (lambda: world.render(rows([0]), trait().repeat(2, 1), FRONT, None, 8), "1 rows and traits 2"),
        (lambda: world.render(rows([0]) * math.nan, None, FRONT, None, 8), "finite"),
        (lambda: world.render(rows([0]), None, FRONT[0], None, 8), r"cam2world must be \(\*, 4, 4\)"),
        (lambda: world.render(rows([0]), None, FRONT, None, 0), "at least 1"),
        (lambda: world.trace(rows([0, 1]), None, torch.zeros(1, 3), torch.zeros(1, 4, 3)), r"origins must be \(2, 3\)"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ConvloraError, match=message):
        call()


def test_without_numba_the_lab_imports_and_says_what_to_install():
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch\n"
        "from convlora.errors import ConvloraError\n"
        "from convlora.integrations.eg3d import lab\n"
        "try: lab.sdf(torch.zeros(1, 59), None, torch.zeros(1, 1, 3))\n"
        "except ConvloraError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 'pip install "convlora[lab]"' in run.stdout
