"""LoRA on our StyleGAN2 layers: the factored modulated convolution against the full effective weight."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import convlora
from convlora.factored import LowRankWeight
from convlora.integrations.stylegan2.layers import Conv2dLayer, FullyConnectedLayer, SynthesisLayer, ToRGBLayer
from convlora.integrations.stylegan2.ops import modulated_conv2d

LAYERS = {
    "conv1": lambda: SynthesisLayer(8, 6, 5, 9),
    "conv0_up": lambda: SynthesisLayer(8, 6, 5, 18, up=2),
    "clamped": lambda: SynthesisLayer(8, 6, 5, 9, conv_clamp=0.5),
    "torgb": lambda: ToRGBLayer(8, 6, 5),
}


def call(layer, x, w, fused):
    extra = {"noise_mode": "const"} if isinstance(layer, SynthesisLayer) else {}
    return layer(x, w, fused_modconv=fused, **extra)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_both_paths_agree(name, fused, randomize):
    layer = LAYERS[name]().double()
    if isinstance(layer, SynthesisLayer):
        nn.init.constant_(layer.noise_strength, 0.3)
    x, w = torch.randn(3, 8, 9, 9).double().requires_grad_(), torch.randn(3, 5).double().requires_grad_()
    y0 = call(layer, x, w, fused)
    other = copy.deepcopy(layer)
    low_rank = convlora.inject_lora(layer, rank=2, path="low_rank", targets=[""])
    weight = convlora.inject_lora(other, rank=2, path="weight", targets=[""])
    torch.testing.assert_close(call(layer, x, w, fused), y0, rtol=1e-12, atol=1e-12)
    assert torch.equal(call(other, x, w, fused), y0)
    randomize(low_rank)
    weight.load_state_dict(low_rank.state_dict())
    results = []
    for module, adapter in ((layer, low_rank), (other, weight)):
        y = call(module, x, w, fused)
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, w, *adapter.parameters()])))
    assert not torch.allclose(results[0][0], y0)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(call(twin, x, w, fused), call(layer, x, w, fused))
    merged = call(layer, x, w, fused)
    low_rank.merge()
    torch.testing.assert_close(call(layer, x, w, fused), merged, rtol=1e-9, atol=1e-9)


def test_identity_is_bit_exact_on_the_low_rank_path_without_fused_rounding():
    layer = SynthesisLayer(8, 6, 5, 9)
    x, w = torch.randn(3, 8, 9, 9), torch.randn(3, 5)
    y0 = call(layer, x, w, False)
    convlora.inject_lora(layer, path="low_rank", targets=[""])
    assert torch.equal(call(layer, x, w, False), y0)


def test_half_precision_falls_back_to_the_dense_weight_where_it_must_normalise_first(randomize):
    layer = SynthesisLayer(8, 6, 5, 9)
    x, w = torch.randn(2, 8, 9, 9), torch.randn(2, 5)
    adapter = convlora.inject_lora(layer, path="low_rank", targets=[""])
    randomize(adapter)
    y = call(layer, x, w, False)
    torch.testing.assert_close(call(layer, x.half(), w, False).float(), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("build", [lambda: FullyConnectedLayer(8, 6, lr_multiplier=0.01), lambda: Conv2dLayer(8, 6, 3)])
def test_equalised_layers_take_the_change_before_their_gain(build, randomize):
    layer = build().double()
    x = torch.randn(2, 8).double() if isinstance(layer, FullyConnectedLayer) else torch.randn(2, 8, 5, 5).double()
    y0 = layer(x)
    adapter = convlora.inject_lora(layer)
    assert torch.equal(layer(x), y0)
    randomize(adapter)
    y1 = layer(x)
    plain = build().double()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "convlora" not in k})
    with torch.no_grad():
        plain.weight.add_(adapter.delta(""))
    torch.testing.assert_close(plain(x), y1, rtol=1e-12, atol=1e-12)


def test_demodulation_of_a_weight_that_is_taken_away_whole_stays_finite():
    """Its sum of squares is a difference of equal numbers, which rounding may leave below zero."""
    base, styles = torch.randn(6, 64, 3, 3), torch.randn(3, 64).requires_grad_()
    left, right = -torch.eye(6).requires_grad_(), base.flatten(1).clone().requires_grad_()
    y = modulated_conv2d(torch.randn(3, 64, 9, 9), LowRankWeight(base, left, right), styles, padding=1)
    assert y.isfinite().all() and float(y.detach().abs().max()) < 0.1
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [styles, left, right]))
