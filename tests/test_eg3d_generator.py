"""The tri-plane generator: official keys and counts, cameras, gradients, precision, quirks, files."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from vectors import DATA

from convlora.errors import ConvloraError, FileError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import cameras, renderer
from convlora.integrations.eg3d.superresolution import MODULES, Superresolution

KEYS = {
    "ffhq512-128": ("eg3d_ffhq512_keys.json", 30_662_136),
    "ffhqrebalanced512-64": ("eg3d_ffhq512_keys.json", 30_662_136),
    "afhqcats512-128": ("eg3d_afhqcats512_keys.json", 29_587_512),
    "shapenetcars128-64": ("eg3d_shapenetcars128_keys.json", 29_587_512),
}


def tiny(module="SuperresolutionHybrid2X", side=128, **rendering):
    torch.manual_seed(0)
    config = copy.deepcopy(eg3d.CONFIGS["lab"])
    config.update(
        z_dim=8,
        w_dim=16,
        img_resolution=side,
        plane_resolution=16,
        plane_channels=4,
        decoder_hidden=8,
        feature_channels=6,
        channel_base=128,
        channel_max=16,
        sr_kwargs=dict(widths=[6, 4]),
        neural_rendering_resolution=12,
    )
    config["rendering_kwargs"].update(
        {"superresolution_module": module, "depth_resolution": 6, "depth_resolution_importance": 6, **rendering}
    )
    return eg3d.TriPlaneGenerator(**config).eval()


def inputs(n=2, seed=0):
    z = torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return z, cameras.random_views(n, seed=seed)


FIXED = dict(noise_mode="const", deterministic=True)


@pytest.mark.parametrize("name", KEYS)
def test_official_keys_shapes_order_and_count(name):
    file, count = KEYS[name]
    want = json.loads((DATA / file).read_text())
    with torch.device("meta"):
        G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS[name])
    state = G.state_dict()
    assert sorted(state) == sorted(want)
    parameters = {k for k, _ in G.named_parameters()}
    for key, (shape, dtype, kind) in want.items():
        assert list(state[key].shape) == shape, key
        assert str(state[key].dtype) == f"torch.{dtype}"
        assert (key in parameters) == (kind == "param"), key
    assert sum(p.numel() for p in G.parameters()) == count
    # children come in another order there; inside each child the order is the same
    for child in ("backbone.", "superresolution.", "decoder."):
        assert [k for k in state if k.startswith(child)] == [k for k in want if k.startswith(child)]
    assert G.num_ws == 14
    assert G.neural_rendering_resolution == int(name.rpartition("-")[2])


def test_default_neural_resolution_is_the_official_64():
    config = {k: v for k, v in eg3d.CONFIGS["ffhq512-128"].items() if k != "neural_rendering_resolution"}
    with torch.device("meta"):
        assert eg3d.TriPlaneGenerator(**config).neural_rendering_resolution == 64


def test_lab_configuration():
    torch.manual_seed(0)
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["lab"]).eval()
    assert sum(p.numel() for p in G.parameters()) <= 2_000_000
    with torch.no_grad():
        out = G(torch.randn(1, 96), cameras.frontal(), **FIXED)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "image": (1, 3, 128, 128),
        "image_raw": (1, 3, 64, 64),
        "image_depth": (1, 1, 64, 64),
    }
    assert all(v.isfinite().all() for v in out.values())
    assert 2.25 <= out["image_depth"].min() and out["image_depth"].max() <= 3.3 + 1.05 / 19


def test_building_leaves_the_configuration_alone():
    before = copy.deepcopy(eg3d.CONFIGS["lab"])
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["lab"])
    G.rendering_kwargs["depth_resolution"] = 3
    assert eg3d.CONFIGS["lab"] == before
    assert G.config["rendering_kwargs"]["depth_resolution"] == 3


def test_each_sample_is_its_own():
    G = tiny()
    z, c = inputs(3)
    together = G(z, c, **FIXED)
    for i in range(3):
        alone = G(z[i : i + 1], c[i : i + 1], **FIXED)
        for key in ("image", "image_raw"):  # the depth is clamped with limits of the whole batch
            torch.testing.assert_close(alone[key][0], together[key][i], rtol=0, atol=5e-5)


def test_deterministic_twice_equal_and_random_otherwise():
    G = tiny()
    z, c = inputs()
    first, second = G(z, c, **FIXED), G(z, c, **FIXED)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(G(z, c, noise_mode="const")["image_raw"], G(z, c, noise_mode="const")["image_raw"])


def test_gradients_reach_weights_latents_and_cameras():
    G = tiny(clean_image_raw=False).train()
    z, c = inputs()
    ws = G.mapping(z).detach().requires_grad_()
    c.requires_grad_()
    out = G.synthesis(ws, c, noise_mode="random")
    sum(v.square().mean() for v in out.values()).backward()
    assert ws.grad.isfinite().all() and ws.grad.abs().sum(dim=(0, 2)).min() > 0  # every latent is used
    assert c.grad.isfinite().all() and c.grad[:, :12].abs().max() > 0
    for name, p in G.named_parameters():
        if name.startswith("backbone.mapping"):
            continue
        silent = name.startswith("superresolution") and name.endswith("noise_strength")  # its noise mode is 'none'
        assert (p.grad is None) == silent, name
        assert silent or p.grad.isfinite().all(), name
        assert silent or p.grad.abs().max() > 0, name


def test_camera_gradient_is_the_slope():
    G = tiny(depth_resolution_importance=0).double()
    z, c = inputs(1)
    ws = G.mapping(z)
    planes = G.planes(ws, noise_mode="const").detach()
    c = c.double().requires_grad_()

    def loss(label):
        return G.render(planes, label, 6, deterministic=True).features.square().mean()

    grad = torch.autograd.grad(loss(c), c)[0][0, 3]
    step = torch.zeros_like(c)
    step[0, 3] = 1e-6
    slope = (loss(c + step) - loss(c - step)) / 2e-6
    torch.testing.assert_close(grad, slope, rtol=1e-4, atol=1e-9)


def test_double_and_single_agree():
    G = tiny()
    z, c = inputs()
    single, double = G(z, c, **FIXED), G.double()(z, c, **FIXED)
    assert all(v.dtype == torch.float64 for v in double.values())
    torch.testing.assert_close(single["image"].double(), double["image"], rtol=0, atol=1e-3)


def test_autocast_and_channels_last():
    G = tiny()
    z, c = inputs()
    want = G(z, c, **FIXED)
    last = tiny().to(memory_format=torch.channels_last)(z, c, **FIXED)
    torch.testing.assert_close(last["image"], want["image"], rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        G.train()
        half = G(z, c, **FIXED)
        half["image"].float().mean().backward()
    assert half["image"].dtype == half["image_raw"].dtype == half["image_depth"].dtype == torch.float32
    assert (half["image_raw"] - want["image_raw"]).abs().mean() < 0.03  # bf16 weights and decoder, full-precision rays
    assert all(p.grad is None or p.grad.isfinite().all() for p in G.parameters())


def test_rays_keep_their_precision_under_autocast():
    c = cameras.random_views(2, seed=1)
    want = renderer.sample_rays(*cameras.split_label(c), 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = renderer.sample_rays(*cameras.split_label(c), 8)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_compiles_without_graph_breaks():
    G = tiny()
    z, c = inputs()
    ws = G.mapping(z).detach()

    def image(ws, c):
        return G.synthesis(ws, c, **FIXED)["image"]

    torch.testing.assert_close(torch.compile(image, backend="eager", fullgraph=True)(ws, c), image(ws, c))


def test_folded_planes_equal_three_planes():
    torch.manual_seed(0)
    planes = torch.randn(2, 3, 4, 9, 9, dtype=torch.float64)
    points = torch.rand(2, 40, 3, dtype=torch.float64) * 1.4 - 0.7  # some outside
    want = renderer.sample_planes(planes, points, 1.1).mean(1)
    got = renderer.sample_folded(renderer.fold_planes(planes), points, 1.1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_merging_passes_equals_sorting_the_colours():
    """The renderer sorts weights only; here the colours travel with them, as the method is usually written."""
    G = tiny().double()
    z, c = inputs()
    planes = G.planes(G.mapping(z), noise_mode="const")
    out = G.render(planes, c, 5, deterministic=True)
    origins, directions = renderer.sample_rays(*cameras.split_label(c.double()), 5)
    points = origins[:, :, None] + out.depths[..., None] * directions[:, :, None]
    field = G.renderer.run_model(planes, G.decoder, points.flatten(1, 2), None, G.rendering_kwargs)
    colors, sigma = (field[k].unflatten(1, out.depths.shape[1:]) for k in ("rgb", "sigma"))
    want, depth, weights = renderer.march_rays(colors, sigma.squeeze(-1), out.depths)
    torch.testing.assert_close(out.features, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.depth, depth, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.weight_sum, weights.sum(-1, keepdim=True), rtol=0, atol=1e-10)


def test_rendering_a_solid_ball_finds_its_surface():
    """An analytic scene through the marcher: depth where the ray meets the ball, background white."""
    cam2world, intrinsics = cameras.split_label(cameras.frontal())
    origins, directions = renderer.sample_rays(cam2world, intrinsics, 17)
    depths = renderer.stratified_depths(origins, 2.2, 3.2, 400, deterministic=True)
    points = origins[:, :, None] + depths[..., None] * directions[:, :, None]
    sigma = torch.where(points.norm(dim=-1) < 0.3, 1e4, -100.0)
    rgb, depth, weights = renderer.march_rays(torch.zeros(*sigma.shape, 3), sigma, depths, white_back=True)
    centre = 17 * 8 + 8
    assert abs(depth[0, centre, 0] - 2.4) < 1 / 399 * 2  # two sample intervals
    assert weights.sum(-1)[0, 0] == 0 and torch.equal(rgb[0, 0], torch.ones(3))
    torch.testing.assert_close(rgb[0, centre], -torch.ones(3), rtol=0, atol=1e-5)


def test_depth_of_empty_rays_has_no_nan_gradient():
    sigma = torch.full((1, 2, 5), -300.0)
    sigma[0, 1] = 3
    sigma.requires_grad_()
    depths = torch.linspace(1, 2, 5).expand(1, 2, 5)
    _, depth, _ = renderer.march_rays(torch.zeros(1, 2, 5, 3), sigma, depths)
    depth.sum().backward()
    assert depth[0, 0] == 2 and sigma.grad.isfinite().all()


@pytest.mark.parametrize("module, side, resolution", [("2X", 128, 64), ("4X", 256, 128)])
def test_raw_image_carries_the_first_torgb_unless_clean(module, side, resolution):
    z, c = inputs(1)
    kept = {}
    G = tiny(f"SuperresolutionHybrid{module}", side, clean_image_raw=False, depth_resolution_importance=0)
    G.superresolution.block0.torgb.register_forward_hook(lambda m, a, out: kept.update(added=out))
    with torch.no_grad():
        quirk = G(z, c, neural_rendering_resolution=resolution, **FIXED)
        G.rendering_kwargs["clean_image_raw"] = True
        clean = G(z, c, neural_rendering_resolution=resolution, **FIXED)
        torch.testing.assert_close(quirk["image_raw"], clean["image_raw"] + kept["added"])
        assert torch.equal(quirk["image"], clean["image"])
        assert clean["image_raw"].abs().max() <= 1.002
        # with resizing the raw image is left alone
        G.rendering_kwargs["clean_image_raw"] = False
        assert G(z, c, neural_rendering_resolution=8, **FIXED)["image_raw"].abs().max() <= 1.002


@pytest.mark.parametrize("name", MODULES)
def test_superresolution_modules(name):
    recipe = MODULES[name]
    torch.manual_seed(0)
    sr = Superresolution(name, 6, recipe.img_resolution, w_dim=8, widths=(4, 4)).eval()
    assert sr.block1.conv1.conv_clamp == 256  # also in float32
    x = torch.randn(1, 6, 32, 32)
    with torch.no_grad():
        image = sr(x[:, :3], x, torch.randn(1, 5, 8), noise_mode="none")
    assert image.shape == (1, 3, recipe.img_resolution, recipe.img_resolution)
    with pytest.raises(ConvloraError, match=f"images of {recipe.img_resolution} pixels, not 99"):
        Superresolution(name, 6, 99)


def test_4x_refuses_larger_features():
    sr = Superresolution("SuperresolutionHybrid4X", 6, 256, w_dim=8, widths=(4, 4))
    with pytest.raises(ConvloraError, match="at most 128 pixels, got 160"):
        sr(torch.zeros(1, 3, 160, 160), torch.zeros(1, 6, 160, 160), torch.zeros(1, 5, 8))


def test_only_the_last_latent_reaches_superresolution():
    sr = Superresolution("SuperresolutionHybrid2X", 6, 128, w_dim=8, widths=(4, 4)).eval()
    x, ws = torch.randn(1, 6, 16, 16), torch.randn(1, 5, 8)
    other = ws.clone()
    other[:, :-1] = 0
    assert torch.equal(sr(x[:, :3], x, ws, noise_mode="none"), sr(x[:, :3], x, other, noise_mode="none"))


def test_planes_and_resolution_are_reused():
    G = tiny()
    z, c = inputs(1)
    ws = G.mapping(z)
    want = G.synthesis(ws, c, **FIXED)
    planes = G.planes(ws, noise_mode="const")
    assert torch.equal(G.synthesis(ws, c, planes=planes, deterministic=True)["image"], want["image"])
    views = cameras.random_views(3, seed=5)
    many = G.synthesis(ws.expand(3, -1, -1), views, planes=planes, deterministic=True)["image_raw"]
    each = torch.cat([G.synthesis(ws, views[i : i + 1], **FIXED)["image_raw"] for i in range(3)])
    torch.testing.assert_close(many, each, rtol=0, atol=5e-5)
    G.synthesis(ws, c, cache_backbone=True, **FIXED)
    assert torch.equal(G.synthesis(ws * 0, c, use_cached_backbone=True, **FIXED)["image_raw"], want["image_raw"])
    assert G.synthesis(ws, c, neural_rendering_resolution=9)["image_raw"].shape[-1] == 9
    assert G.synthesis(ws, c)["image_raw"].shape[-1] == 9  # stored, as in the official code


def test_sample_agrees_with_sample_mixed():
    G = tiny()
    z, c = inputs()
    points = torch.rand(2, 7, 3) - 0.5
    a = G.sample(points, None, z, c, noise_mode="const")
    b = G.sample_mixed(points, torch.zeros_like(points), G.mapping(z, c), noise_mode="const")
    assert a["sigma"].shape == (2, 7, 1) and a["rgb"].shape == (2, 7, 6)
    assert torch.equal(a["sigma"], b["sigma"]) and torch.equal(a["rgb"], b["rgb"])


def test_conditioning():
    z, c = inputs()
    G = tiny()  # c_gen_conditioning_zero
    assert torch.equal(G.mapping(z, c), G.mapping(z))
    G.rendering_kwargs["c_gen_conditioning_zero"] = False
    with pytest.raises(ConvloraError, match="conditioned on a camera"):
        G.mapping(z)
    conditioned = G.mapping(z, c)
    del G.rendering_kwargs["c_scale"]
    assert torch.equal(G.mapping(z, c), tiny().mapping(z)) and not torch.equal(G.mapping(z, c), conditioned)


def test_round_trip(tmp_path):
    G = tiny()
    G.rendering_kwargs["depth_resolution"] = 5
    G.neural_rendering_resolution = 10
    z, c = inputs()
    H = eg3d.load_generator(eg3d.save_generator(G, tmp_path / "g.safetensors"))
    assert H.neural_rendering_resolution == 10
    assert torch.equal(H(z, c, **FIXED)["image"], G(z, c, **FIXED)["image"])


def test_bad_files_and_options(tmp_path):
    file = tmp_path / "network.pkl"
    file.write_bytes(b"\x80\x03.")
    with pytest.raises(FileError, match="is a pickle"):
        eg3d.load_generator(file)
    config = copy.deepcopy(eg3d.CONFIGS["lab"])
    with pytest.raises(ConvloraError, match="no option 'plane_size'"):
        eg3d.TriPlaneGenerator(**config, plane_size=3)
    config["rendering_kwargs"]["superresolution_module"] = "training.superresolution.Nothing"
    with pytest.raises(ConvloraError, match="unknown super-resolution module 'Nothing'"):
        eg3d.TriPlaneGenerator(**config)
    G = tiny(ray_start="auto")
    z, c = inputs(1)
    with pytest.raises(ConvloraError, match="two numbers or both 'auto', got 'auto' and 3.3"):
        G(z, c)
    with pytest.raises(ConvloraError, match=r"shape \(N, 25\), got \(1, 16\)"):
        G(z, c[:, :16])


def test_every_listed_name_can_be_imported():
    names = {"load_album", "find_anchors", "personalize", "inject_personal", "tasks", "metrics", "lab", "report"}
    assert names <= set(dir(eg3d))
    assert all(getattr(eg3d, name) is not None for name in eg3d.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eg3d.nothing


# ---- cameras -------------------------------------------------------------------------------------------------------


def test_frontal_camera():
    cam2world, intrinsics = cameras.split_label(cameras.frontal(2))
    want = torch.tensor([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 2.7], [0, 0, 0, 1]])
    torch.testing.assert_close(cam2world, want.expand(2, 4, 4), rtol=0, atol=1e-6)
    assert intrinsics[0, 0, 0] == pytest.approx(4.2647)


def test_label_round_trip_and_directions():
    pose = cameras.look_at(torch.tensor([math.pi / 2 + 0.3]), cameras.vertical_angle(0.2))
    assert pose[0, 0, 3] > 0  # larger h: camera at +x
    assert pose[0, 1, 3] == pytest.approx(2.7 * math.sin(0.2), abs=1e-5)  # raised by the elevation asked for
    back, intrinsics = cameras.split_label(cameras.label(pose, cameras.fov_to_intrinsics(18.837)))
    assert torch.equal(back, pose) and intrinsics.shape == (1, 3, 3)
    rotation = pose[0, :3, :3]
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), rtol=0, atol=1e-6)
    assert torch.linalg.det(rotation) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ConvloraError, match=r"\(N, 4, 4\), got \(3, 4\)"):
        cameras.label(pose[0, :3])


def test_random_views():
    views = cameras.random_views(64, yaw=0.3, pitch=0.1, seed=3)
    assert torch.equal(views, cameras.random_views(64, yaw=0.3, pitch=0.1, seed=3))
    assert not torch.equal(views, cameras.random_views(64, yaw=0.3, pitch=0.1, seed=4))
    origin = cameras.split_label(views)[0][:, :3, 3]
    torch.testing.assert_close(origin.norm(dim=-1), torch.full((64,), 2.7), rtol=0, atol=1e-5)
    yaw = torch.atan2(origin[:, 0], origin[:, 2])
    assert yaw.abs().max() <= 0.3 + 1e-5 and yaw.abs().max() > 0.2
    orbit = cameras.split_label(cameras.random_views(8, mode="orbit"))[0][:, :3, 3]
    torch.testing.assert_close(orbit.mean(0)[:2], torch.zeros(2), rtol=0, atol=1e-5)  # a closed, symmetric path
    with pytest.raises(ConvloraError, match="one of uniform, orbit"):
        cameras.random_views(2, mode="spiral")
