"""Factors with a batch dimension: another change for each sample, against the samples one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_factored import convolutions
from tiny import tiny_generator
from torch import nn

import convlora
from convlora import factored, geometry
from convlora.errors import ConvloraError
from convlora.factored import LowRankWeight
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.personalize import TARGETS
from convlora.integrations.stylegan2.layers import Conv2dLayer, FullyConnectedLayer, SynthesisLayer, ToRGBLayer
from convlora.integrations.stylegan2.ops import modulated_conv2d


@pytest.mark.parametrize("skinny", [True, False])
@settings(deadline=None, max_examples=40)
@given(case=convolutions(), rank=st.integers(1, 3), first=st.integers(0, 10))
def test_convolutions_are_those_of_each_sample_s_whole_weight(skinny, case, rank, first):
    (_, *rest), shape, found = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "_FEW", 1e9 if skinny else 0)
        torch.manual_seed(first)
        outputs = shape[1] * found.groups if found.transposed and not found.swapped else shape[0]
        base = torch.randn(shape).double()
        cols = base[0].numel()
        sizes = (3, *rest), (3, shape[0], rank), (3, rank, cols), (outputs,)
        inputs = x, left, right, bias = [torch.randn(size).double().requires_grad_() for size in sizes]
        y = factored.convolve(x, LowRankWeight(base, left, right), bias, found)
        each = []
        for i in range(3):
            weight = base + (left[i] @ right[i]).view_as(base)
            each.append(found.convolve(x[i : i + 1], weight, bias))
        expected = torch.cat(each)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        noise = torch.randn_like(y)
        got = torch.autograd.grad((y.sin() * noise).sum(), inputs)
        wanted = torch.autograd.grad((expected.sin() * noise).sum(), inputs)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_linear_maps_and_factors_that_some_samples_share():
    base, bias = torch.randn(9, 7).double(), torch.randn(9).double()
    left, right = torch.randn(3, 9, 2).double(), torch.randn(3, 2, 7).double()
    for x in (torch.randn(3, 7).double(), torch.randn(3, 4, 5, 7).double()):
        y = factored.linear(x, LowRankWeight(base, left, right), bias)
        each = [nn.functional.linear(x[i], base + left[i] @ right[i], bias) for i in range(3)]
        torch.testing.assert_close(y, torch.stack(each))
        shared = factored.linear(x, LowRankWeight(base, left, right[0]), bias)
        torch.testing.assert_close(shared[1], nn.functional.linear(x[1], base + left[1] @ right[0], bias))
    with pytest.raises(ConvloraError, match="for each of 3 samples met a batch of 2"):
        factored.linear(torch.randn(2, 7).double(), LowRankWeight(base, left, right), bias)


MODULES = {
    "linear": (lambda: nn.Linear(8, 6), (3, 8)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (3, 8, 9, 9)),
    "conv 1d": (lambda: nn.Conv1d(8, 6, 3), (3, 8, 9)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, stride=2, groups=2), (3, 8, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2), (3, 8, 9, 9)),
    "fully connected": (lambda: FullyConnectedLayer(8, 6, activation="lrelu"), (3, 8)),
    "plain up": (lambda: Conv2dLayer(8, 6, 3, up=2), (3, 8, 9, 9)),
    "plain down": (lambda: Conv2dLayer(8, 6, 3, down=2), (3, 8, 9, 9)),
    "modulated": (lambda: SynthesisLayer(8, 6, 5, 9, use_noise=False), (3, 8, 9, 9)),
    "modulated up": (lambda: SynthesisLayer(8, 6, 5, 18, up=2, use_noise=False), (3, 8, 9, 9)),
    "torgb": (lambda: ToRGBLayer(8, 6, 5), (3, 8, 9, 9)),
}


def batched(model: nn.Module, states: list[dict[str, torch.Tensor]], *args, **kwargs):
    """The model with the i-th adapter state for the i-th sample."""
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    return torch.func.functional_call(model, stacked, args, kwargs)


def random_states(adapter, model: nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    own = {id(p) for p in adapter.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) in own]
    assert len(names) == len(own)
    return [{name: 0.3 * torch.randn_like(model.get_parameter(name)) for name in names} for _ in range(count)]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_every_layer_kind_takes_a_change_per_sample(name, grad):
    build, size = MODULES[name]
    module = build().double()
    x = torch.randn(size).double()
    extra = (torch.randn(3, 5).double(),) if isinstance(module, SynthesisLayer | ToRGBLayer) else ()
    adapter = convlora.inject(module, "lora", 1, path="low_rank")
    second = convlora.inject_lora(module, 1, targets=list(adapter.layers), name="other", path="low_rank")
    for p in second.parameters():  # the same for all samples, beside the others
        nn.init.normal_(p)
    states = random_states(adapter, module, 3)
    with torch.set_grad_enabled(grad):
        y = batched(module, states, x, *extra)
        for i, state in enumerate(states):
            alone = (x[i : i + 1], *(e[i : i + 1] for e in extra))
            expected = torch.func.functional_call(module, state, alone)
            torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(y, batched(module, states[::-1], x, *extra))


def test_half_precision_modulated_convolution_per_sample():
    torch.manual_seed(0)
    base, left, right = torch.randn(6, 8, 3, 3), torch.randn(2, 6, 1), torch.randn(2, 1, 72)
    x, styles = torch.randn(2, 8, 9, 9), 3e3 * torch.randn(2, 8)
    full = modulated_conv2d(x, LowRankWeight(base, left, right), styles, padding=1)
    half = modulated_conv2d(x.half(), LowRankWeight(base, left, right), styles, padding=1)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("method", ["lora", "lidb"])
def test_different_people_in_one_batch_of_eg3d(method):
    """Pictures and the gradients of every person's factors are those of the person alone."""
    G = tiny_generator().double()
    adapter = convlora.inject(G, method, 1, targets=list(TARGETS), path="low_rank")
    states = random_states(adapter, G, 3)
    for state in states:
        for value in state.values():
            value.requires_grad_()
    ws = torch.randn(3, 1, G.w_dim).double().expand(-1, G.num_ws, -1)
    labels = cameras.random_views(3).double()
    target = torch.randn(3, 3, G.img_resolution, G.img_resolution).double()

    class Synthesis(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.G = G

        def forward(self, ws, labels):
            return self.G.synthesis(ws, labels, noise_mode="const", deterministic=True)["image"]

    model = Synthesis()
    states = [{f"G.{name}": value for name, value in state.items()} for state in states]
    images = batched(model, states, ws, labels)
    loss = (images - target).square().mean((1, 2, 3)).sum()
    together = torch.autograd.grad(loss, [value for state in states for value in state.values()])
    found = iter(together)
    for i, state in enumerate(states):
        image = torch.func.functional_call(model, state, (ws[i : i + 1], labels[i : i + 1]))
        torch.testing.assert_close(images[i : i + 1], image, rtol=1e-9, atol=1e-9)
        alone = torch.autograd.grad((image - target[i]).square().mean(), list(state.values()))
        for gradient in alone:
            torch.testing.assert_close(next(found), gradient, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(images[0], images[1])


def test_layers_that_form_their_weight_say_so():
    layer = nn.Linear(6, 5)
    adapter = convlora.inject_lora(layer, 1, path="weight")
    with pytest.raises(ConvloraError, match='Linear computes with its whole weight.*path="low_rank"'):
        batched(layer, random_states(adapter, layer, 3), torch.randn(3, 6))
