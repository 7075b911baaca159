"""Cameras, rays, tri-planes and volume rendering against tensors of the official code."""

from __future__ import annotations

import math

import pytest
import torch
from vectors import check, det, load_recipe, vectors

from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d import renderer as R
from convlora.integrations.eg3d.generator import OSGDecoder

CAMERA, RENDER = vectors("07_camera_rays"), vectors("08_renderer")
TIGHT = 5e-6


def test_poses():
    for i, pose in enumerate(CAMERA[0]["poses"]):
        cam = cameras.look_at(**pose)
        check(cam[0], CAMERA[1]["lookat"][i], TIGHT)
        origin_looking = cameras.look_at(pose["h"], pose["v"], radius=pose["radius"])
        check(origin_looking[0], CAMERA[1]["gaussian_zero_std"][i], TIGHT)
    want = CAMERA[1]["create_cam2world"]
    check(cameras.create_cam2world(det("cam.forward", (4, 3)), det("cam.origin", (4, 3))), want, TIGHT)


def test_poses_in_one_batch():
    poses = CAMERA[0]["poses"]
    h, v, radius, pivot = (
        torch.tensor([p[k] for p in poses], dtype=torch.float32) for k in ("h", "v", "radius", "pivot")
    )
    check(cameras.look_at(h, v, pivot, radius), CAMERA[1]["lookat"], TIGHT)


def test_intrinsics_and_label():
    for name, fov in (("12", 12), ("18.837", 18.837), ("60", 60)):
        check(cameras.fov_to_intrinsics(fov), CAMERA[1][f"intrinsics_fov{name}"], TIGHT)
    pose = cameras.look_at(math.pi / 2, math.pi / 2, (0, 0, 0.2))
    front = cameras.label(pose, cameras.fov_to_intrinsics(18.837))
    check(front, CAMERA[1]["label_ffhq_front"], TIGHT)


@pytest.mark.parametrize("resolution", [4, 5])
def test_rays(resolution):
    origins, directions = R.sample_rays(CAMERA[1]["rays.cam2world"], CAMERA[1]["rays.intrinsics"], resolution)
    check(origins, CAMERA[1][f"rays{resolution}.origins"], TIGHT)
    check(directions, CAMERA[1][f"rays{resolution}.dirs"], TIGHT)


@pytest.mark.parametrize("name, side", [("raybox8", 1.0), ("raybox8_small", 0.4)])
def test_box_limits(name, side):
    rays = R.sample_rays(CAMERA[1]["rays.cam2world"], CAMERA[1]["rays.intrinsics"], 8)
    near, far = R.box_limits(*rays, side)
    check(near, CAMERA[1][f"{name}.start"], TIGHT)
    check(far, CAMERA[1][f"{name}.end"], TIGHT)


def planes():
    return det("rend.planes", (2, 3, 32, 32, 32))


def decoder():
    return load_recipe(OSGDecoder(32, 64, 32), "rend.decoder")


def test_plane_features():
    points = det("rend.points", (2, 50, 3), 0.35)
    check(points, RENDER[1]["points"], 0)
    check(R.project(points[:1, :4])[0], RENDER[1]["projections"], 1e-7)
    check(R.sample_planes(planes(), points, 1), RENDER[1]["plane_features"], TIGHT)
    check(R.sample_planes(planes(), points, 1.6), RENDER[1]["plane_features_bw16"], TIGHT)
    want = RENDER[1]["plane_features"]
    check(R.sample_folded(R.fold_planes(planes()), points, 1), want.mean(1), TIGHT)


def test_decoder():
    for features in (RENDER[1]["plane_features"], RENDER[1]["plane_features"].mean(1)):
        out = decoder()(features)
        check(out["rgb"], RENDER[1]["decoder.rgb"], TIGHT)
        check(out["sigma"], RENDER[1]["decoder.sigma"], TIGHT)


@pytest.mark.parametrize("case", ["march.wb0", "march.wb1", "march_empty"])
def test_marcher(case):
    colors = torch.sigmoid(det("march.colors", (1, 6, 10, 4)))
    sigma = det("march.densities", (1, 6, 10, 1), 8.0).squeeze(-1)
    depths = det("march.depths", (1, 6, 10, 1), 0.3, 2.7).squeeze(-1).sort(-1).values
    if case == "march_empty":
        sigma[:, 2:4] = -300
    rgb, depth, weights = R.march_rays(colors, sigma, depths, white_back=case.endswith("wb1"))
    base, _, tail = case.partition(".")
    names = {k: f"{base}.{k}_{tail}" if tail else f"{base}.{k}" for k in ("rgb", "depth", "weights")}
    check(rgb, RENDER[1][names["rgb"]], TIGHT)
    check(depth, RENDER[1][names["depth"]], TIGHT)
    check(weights.unsqueeze(-1), RENDER[1][names["weights"]], TIGHT)


def test_samplers():
    rays = torch.zeros(1, 2, 3)
    got = R.stratified_depths(rays, 2.25, 3.3, 6, deterministic=True)
    check(got.unsqueeze(-1), RENDER[1]["strat.float"], TIGHT)
    got = R.stratified_depths(rays, 2.25, 3.3, 6, disparity=True, deterministic=True)
    check(got.unsqueeze(-1), RENDER[1]["strat.disparity"], TIGHT)
    near, far = torch.tensor([1.0, 2.0]).reshape(1, 2, 1), torch.tensor([2.0, 4.0]).reshape(1, 2, 1)
    got = R.stratified_depths(rays, near, far, 5, deterministic=True)
    check(got.unsqueeze(-1), RENDER[1]["strat.tensor"], TIGHT)
    z = det("imp.z", (1, 5, 9, 1), 0.3, 2.7).squeeze(-1).sort(-1).values
    weights = torch.softmax(det("imp.w", (1, 5, 8, 1), 2.0).squeeze(-1), dim=-1)
    check(R.importance_depths(z, weights, 7, deterministic=True).unsqueeze(-1), RENDER[1]["imp.samples"], TIGHT)


@pytest.mark.parametrize("case", RENDER[0]["cases"])
def test_rendering(case):
    s, want = RENDER[0]["cases"][case], RENDER[1]
    rays = R.sample_rays(want[f"{case}.cam2world"], want[f"{case}.intrinsics"], s["resolution"])
    with torch.no_grad():
        out = R.render_rays(planes(), decoder(), *rays, s["options"], deterministic=True)
    # random planes change by O(1) per texel, which magnifies rounding of the sample positions
    for got, name in (
        (out.features, "rgb"),
        (out.depth, "depth"),
        (out.weight_sum, "weight_sum"),
        (out.coarse_depths.unsqueeze(-1), "depths_coarse"),
        (out.coarse_weights.unsqueeze(-1), "weights_coarse"),
    ):
        check(got, want[f"{case}.{name}"], 1e-3, mean=3e-5)
    check(out.coarse_sigma.unsqueeze(-1), want[f"{case}.sigma_coarse"], 3e-3)
    if s["options"]["depth_resolution_importance"]:
        check(out.depths.unsqueeze(-1), want[f"{case}.depths_all"], 1e-3, mean=3e-5)
        check(out.weights.unsqueeze(-1), want[f"{case}.weights_all"], 1e-3, mean=3e-5)
