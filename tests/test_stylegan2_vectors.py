"""StyleGAN2 operators, layers and networks against tensors of the official code.

Limits: float32 noise of the reference itself, measured against a float64 implementation.
"""

from __future__ import annotations

import math

import pytest
import torch
from vectors import check, det, load_recipe, vectors

from convlora.integrations.stylegan2 import ops
from convlora.integrations.stylegan2.generator import MappingNetwork, SynthesisNetwork
from convlora.integrations.stylegan2.layers import Conv2dLayer, FullyConnectedLayer, SynthesisLayer, ToRGBLayer

FC, MAPPING, MODCONV, FIR, SYNTHESIS = (
    vectors(name) for name in ("01_fc_bias_act", "02_mapping", "03_modconv", "04_fir", "05_synthesis")
)
TIGHT = 5e-6


def test_recipe():
    check(det("recipe_check", (8,)), FC[1]["recipe_check"], 0)


@pytest.mark.parametrize("case", FC[0]["cases"])
def test_fully_connected(case):
    kwargs = FC[0]["cases"][case]
    layer = FullyConnectedLayer(**kwargs)
    lr = kwargs.get("lr_multiplier", 1)
    weight = det(f"{case}.weight", tuple(layer.weight.shape), scale=1 / lr)
    layer.weight.data.copy_(weight)
    if layer.bias is not None:
        shift = kwargs.get("bias_init", 0)
        layer.bias.data.copy_(det(f"{case}.bias", tuple(layer.bias.shape), scale=0.1 / lr, shift=shift))
    check(layer(det(f"{case}.x", (5, kwargs["in_features"]))), FC[1][f"{case}.y"], TIGHT)


BIAS_ACT = {
    **{name: dict(act=name) for name in ops.ACTIVATIONS},
    "lrelu_gain_clamp": dict(act="lrelu", gain=math.sqrt(2) * math.sqrt(0.5), clamp=1.25),
    "lrelu_alpha01_nobias": dict(act="lrelu", alpha=0.1, gain=3, b=None),
    "linear_clamp": dict(clamp=1.5),
}


@pytest.mark.parametrize("case", BIAS_ACT)
def test_bias_act(case):
    x, b = det("bias_act.x", (2, 6, 3, 4), 2.0), det("bias_act.b", (6,))
    check(ops.bias_act(x, **{"b": b, **BIAS_ACT[case]}), FC[1][f"bias_act.{case}"], TIGHT)


def test_every_bias_act_vector_is_used():
    assert {k.removeprefix("bias_act.") for k in FC[1] if k.startswith("bias_act.")} == set(BIAS_ACT)


@pytest.mark.parametrize("case", MAPPING[0]["cases"])
def test_mapping(case):
    spec = MAPPING[0]["cases"][case]
    net = load_recipe(MappingNetwork(**spec["kwargs"]), case)
    z, c = det(f"{case}.z", (4, net.z_dim)), det(f"{case}.c", (4, net.c_dim))
    for call, kwargs in spec["calls"].items():
        check(net(z, c, **kwargs), MAPPING[1][f"{case}.{call}"], TIGHT)
    if case == "map_eg3d":
        check(net(z, torch.zeros_like(c)), MAPPING[1]["map_eg3d.czero"], TIGHT)


CONVS = {k: v for k, v in MODCONV[0]["cases"].items() if "kernel" in v}
PLAIN = {k: v for k, v in MODCONV[0]["cases"].items() if "layer" in v}
LAYERS = {k: v for k, v in MODCONV[0]["cases"].items() if "calls" in v}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", CONVS)
def test_modulated_conv(case, fused):
    s = CONVS[case]
    half = s["dtype"] == "torch.float16"
    x = det(f"{case}.x", (s["N"], s["I"], s["H"], s["W"])).to(torch.float16 if half else torch.float32)
    noise = det(f"{case}.noise", (s["H"] * s["up"], s["W"] * s["up"])) if s["noise"] else None
    y = ops.modulated_conv2d(
        x,
        det(f"{case}.weight", (s["O"], s["I"], s["kernel"], s["kernel"])),
        det(f"{case}.styles", (s["N"], s["I"]), 0.5, 1.0),
        noise=noise,
        up=s["up"],
        padding=s["padding"],
        resample_filter=ops.setup_filter([1, 3, 3, 1]),
        demodulate=s["demodulate"],
        flip_weight=s["flip_weight"],
        fused_modconv=fused,
    )
    assert y.dtype == x.dtype
    check(y, MODCONV[1][f"{case}.{'fused' if fused else 'unfused'}"], 5e-3 if half else 2e-5)


@pytest.mark.parametrize("case", PLAIN)
def test_plain_conv_layer(case):
    s = PLAIN[case]
    layer = load_recipe(Conv2dLayer(**s["layer"]), case)
    y = layer(det(f"{case}.x", (s["N"], s["layer"]["in_channels"], s["H"], s["W"])), gain=s["gain"])
    check(y, MODCONV[1][f"{case}.y"], 2e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_modulated_layers(case):
    s = LAYERS[case]
    layer = load_recipe({"SynthesisLayer": SynthesisLayer, "ToRGBLayer": ToRGBLayer}[s["cls"]](**s["kwargs"]), case)
    x = det(f"{case}.x", (2, s["kwargs"]["in_channels"], s["input_size"], s["input_size"]))
    w = det(f"{case}.w", (2, s["kwargs"]["w_dim"]))
    for call, kwargs in s["calls"].items():
        check(layer(x, w, **kwargs), MODCONV[1][f"{case}.{call}"], 2e-5)


FILTERS = {
    "1331": [1, 3, 3, 1],
    "1253": [1, 2, 5, 3],
    "8tap": FIR[1]["filter_8tap"],
    "3x3": FIR[1]["filter_3x3"],
}


@pytest.mark.parametrize("name", FILTERS)
def test_resampling(name):
    x, want = det("fir.x", (2, 3, 7, 6)), FIR[1]
    f = ops.setup_filter(FILTERS[name])
    check(f, want[f"filter_{name}"], 1e-7)
    check(ops.filter2d(x, f), want[f"filter_{name}_y"], TIGHT)
    check(ops.upsample2d(x, f), want[f"up2_{name}"], TIGHT)
    check(ops.downsample2d(x, f), want[f"down2_{name}"], TIGHT)
    check(ops.upsample2d(x, f, flip_filter=True), want[f"up2_{name}_flip"], TIGHT)


def test_resampling_other():
    x, want = det("fir.x", (2, 3, 7, 6)), FIR[1]
    f = ops.setup_filter([1, 2, 5, 3])
    check(ops.setup_filter([1, 2, 5, 3], gain=4, flip_filter=True), want["filter_1253_gain4_flip"], 1e-6)
    check(ops.upfirdn2d(x, f, up=(3, 2), down=(2, 1), padding=(2, -1, 3, -2), gain=1.7), want["generic"], TIGHT)
    check(ops.upfirdn2d(x, None, up=2, padding=1), want["none_filter"], TIGHT)
    check(ops.upsample2d(x, ops.setup_filter([1, 3, 3, 1]), up=4), want["up4_1331"], TIGHT)


@pytest.mark.parametrize("case", SYNTHESIS[0]["cases"])
def test_synthesis(case):
    s = SYNTHESIS[0]["cases"][case]
    net = load_recipe(SynthesisNetwork(**s["kwargs"]), case)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == s["shapes"]
    assert net.num_ws == s["num_ws"]
    ws = det(f"{case}.ws", (2, s["num_ws"], s["kwargs"]["w_dim"]))
    for call, kwargs in s["calls"].items():
        check(net(ws, **kwargs), SYNTHESIS[1][f"{case}.{call}"], 5e-5)
    check(net(ws, noise_mode="const", fused_modconv=True), SYNTHESIS[1][f"{case}.const"], 5e-5)


def test_synthesis_block_outputs():
    case = "syn_skip"
    s = SYNTHESIS[0]["cases"][case]
    net = load_recipe(SynthesisNetwork(**s["kwargs"]), case)
    seen = {}
    for r in net.block_resolutions:
        block = getattr(net, f"b{r}")
        block.register_forward_hook(lambda module, args, out, r=r: seen.__setitem__(r, out))
    net(det(f"{case}.ws", (2, s["num_ws"], s["kwargs"]["w_dim"])), noise_mode="const")
    for r, (x, img) in seen.items():
        check(x, SYNTHESIS[1][f"{case}.b{r}.x"], 5e-5)
        check(img, SYNTHESIS[1][f"{case}.b{r}.img"], 5e-5)
