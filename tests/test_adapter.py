"""The handle: switching, stacking, copying, and everything people do with a model while an adapter is on it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convlora


def dcgan() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1), nn.Tanh(),
    )  # fmt: skip


Z = torch.randn(4, 8, 1, 1, generator=torch.Generator().manual_seed(0))


def test_only_the_adapter_trains_and_remove_gives_requires_grad_back():
    net = dcgan()
    net[6].bias.requires_grad_(False)
    adapter = convlora.inject_lora(net, rank=2)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    assert (
        adapter.num_trainable == adapter.num_parameters == sum(2 * sum(row.matrix) for row in convlora.adaptable(net))
    )
    adapter.remove()
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["6.bias"]


def test_training_lowers_a_loss():
    net, target = dcgan().eval(), torch.rand(4, 3, 8, 8) - 0.5
    adapter = convlora.inject_lora(net, rank=2)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (net(Z) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_disabled_and_strength(randomize):
    net = dcgan().eval()
    y0 = net(Z)
    adapter = convlora.inject_lora(net, rank=2, train=["4", "6.bias"])
    randomize(adapter)
    y1 = net(Z)
    with adapter.disabled():
        assert torch.equal(net(Z), y0)
    assert torch.equal(net(Z), y1)
    adapter.disable()
    assert torch.equal(net(Z), y0) and not adapter.enabled
    adapter.enable()
    adapter.set_strength(0.0)
    assert torch.equal(net(Z), y0)
    delta = adapter.delta("3")
    adapter.set_strength({"3": 0.5, "*": 1.0})
    assert delta.abs().max() == 0
    half = adapter.delta("3").clone()
    adapter.set_strength(1.0)
    torch.testing.assert_close(adapter.delta("3"), 2 * half)
    assert torch.equal(net(Z), y1)
    with pytest.raises(convlora.ConvloraError, match=r"'typo\*' matches no layer"):
        adapter.set_strength({"typo*": 1.0})


def test_disabled_inside_a_graph_that_is_still_alive(randomize):
    """Prior preservation: the base's output is taken between the adapter's forward and backward."""
    net = dcgan().eval()
    adapter = convlora.inject_lora(net, rank=1, train=["4"])
    randomize(adapter)
    y = net(Z)
    with adapter.disabled(), torch.no_grad():
        base = net(Z)
    (y - base).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_merge_while_disabled_merged_twice_and_switching_while_merged_are_refused(randomize):
    net = dcgan().eval()
    y0 = net(Z)
    adapter = convlora.inject_lora(net)
    randomize(adapter)
    y1 = net(Z)
    adapter.disable()
    with pytest.raises(convlora.ConvloraError, match="disabled"):
        adapter.merge()
    adapter.enable()
    with pytest.raises(convlora.ConvloraError, match="not merged"):
        adapter.unmerge()
    adapter.merge()
    for action in (adapter.merge, adapter.disable, lambda: adapter.set_strength(0.5)):
        with pytest.raises(convlora.ConvloraError, match="is merged"):
            action()
    with adapter.disabled():
        assert torch.equal(net(Z), y0)
    torch.testing.assert_close(net(Z), y1, rtol=1e-4, atol=1e-5)
    adapter.remove()
    assert torch.equal(net(Z), y0)


def test_merge_for_good_leaves_a_plain_model(randomize):
    net = dcgan().eval()
    adapter = convlora.inject_lora(net, rank=1, train=["*bias"])
    randomize(adapter)
    y1 = net(Z)
    adapter.merge(keep=False)
    fresh = dcgan().eval()
    fresh.load_state_dict(net.state_dict())
    assert [type(m) for m in net.modules()] == [type(m) for m in fresh.modules()]
    assert not any(name.startswith("_convlora") for module in net.modules() for name in vars(module))
    assert torch.equal(fresh(Z), net(Z))
    torch.testing.assert_close(net(Z), y1, rtol=1e-4, atol=1e-5)
    with pytest.raises(convlora.ConvloraError, match="was removed"):
        adapter.delta("0")


def test_two_adapters_add_up_and_merge_in_order(randomize):
    net = dcgan().double().eval()
    z = Z.double()
    y0 = net(z)
    a = convlora.inject_lora(net, rank=1, name="a")
    b = convlora.inject_lora(net, rank=2, name="b", targets=["0", "6"])
    randomize(a), randomize(b)
    both = net(z)
    with pytest.raises(convlora.ConvloraError, match="already has an adapter named 'a'"):
        convlora.inject_lora(net, name="a")
    a.merge()
    torch.testing.assert_close(net(z), both, rtol=1e-9, atol=1e-9)
    b.merge()
    torch.testing.assert_close(net(z), both, rtol=1e-9, atol=1e-9)
    with pytest.raises(convlora.ConvloraError, match="unmerge 'b' first"):
        a.unmerge()
    assert a.merged and b.merged
    b.unmerge(), a.unmerge()
    assert torch.equal(net(z), both)
    a.remove()
    with b.disabled():
        assert torch.equal(net(z), y0)
    b.remove()
    assert torch.equal(net(z), y0) and convlora.Adapter.names(net) == []


def test_batchnorm_statistics_of_trained_modules_belong_to_the_adapter(tmp_path, randomize):
    net = dcgan()
    y0 = net.eval()(Z)
    adapter = convlora.inject_lora(net, rank=1, train=["1"])
    net.train()
    net[4].eval()
    net(Z)
    net.eval()
    randomize(adapter)
    y1 = net(Z)
    adapter.save(tmp_path / "a.safetensors")
    with adapter.disabled():
        assert torch.equal(net(Z), y0)
    fresh = dcgan().eval()
    convlora.load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(Z), y1)
    adapter.remove()
    assert torch.equal(net(Z), y0)


@pytest.mark.parametrize("path", ["weight", "low_rank"])
def test_copies_pickles_and_averages_carry_the_adapter(path, randomize):
    net = dcgan().eval()
    adapter = convlora.inject_lora(net, rank=1, targets=["6"], path=path)
    randomize(adapter)
    y = net(Z)
    twin = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(Z), y)
        handle = convlora.Adapter.of(other)
        handle.remove()
        assert type(other[6]) is nn.Conv2d
    assert torch.equal(net(Z), y), "the copy's removal leaves the original alone"

    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(net)
    before = adapter.state_dict()["6/B"].clone()
    randomize(adapter)
    ema.update_parameters(net)
    averaged = convlora.Adapter.of(ema.module).state_dict()["6/B"]
    torch.testing.assert_close(averaged, 0.5 * before + 0.5 * adapter.state_dict()["6/B"])


def test_state_dict_round_trips_with_and_without_the_adapter(randomize):
    net, base = dcgan().eval(), dcgan().state_dict()
    adapter = convlora.inject_lora(net, train=["1"])
    randomize(adapter)
    y, full = net(Z), copy.deepcopy(net.state_dict())
    net.load_state_dict(base)  # strict: a base checkpoint says nothing about the adapter
    assert torch.equal(net(Z), y)
    randomize(adapter)
    net.load_state_dict(full)
    assert torch.equal(net(Z), y)


def test_moving_to_other_precisions(randomize):
    net = dcgan().eval()
    adapter = convlora.inject_lora(net)
    randomize(adapter)
    y = net(Z)
    adapter.merge()
    net.double()
    torch.testing.assert_close(net(Z.double()).float(), y, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    net.double()
    torch.testing.assert_close(net(Z.double()).float(), y, rtol=1e-4, atol=1e-5)
    assert all(p.dtype == torch.float64 for p in adapter.parameters())


def test_half_precision_base_keeps_float32_factors():
    net = nn.Sequential(nn.Conv2d(8, 8, 3)).bfloat16()
    x = torch.randn(1, 8, 9, 9).bfloat16()
    y = net(x)
    adapter = convlora.inject_lora(net)
    assert torch.equal(net(x), y) and net(x).dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("path", ["weight", "low_rank"])
def test_autocast_compile_functional_call_and_double_backward(path, randomize):
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 4, 3, padding=1)).eval()
    adapter = convlora.inject_lora(net, rank=1, path=path)
    randomize(adapter)
    x = torch.randn(2, 4, 6, 6)
    y = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(net(x).float(), y, rtol=0.05, atol=0.05)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), y, rtol=1e-4, atol=1e-5)

    doubled = {name: 2 * p for name, p in net.named_parameters() if name.endswith(".B")}
    adapter_y = torch.func.functional_call(net, doubled, (x,))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.mul_(2 if name.endswith("/B") else 1)
    torch.testing.assert_close(net(x), adapter_y)

    net64 = net.double()
    parameters = list(adapter.parameters())

    def penalty(*_):  # R1: the gradient's norm, differentiated again with respect to the adapter
        inputs = x.double().requires_grad_()
        (gradient,) = torch.autograd.grad(net64(inputs).sum(), inputs, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, parameters, eps=1e-6, atol=1e-6)


def test_embeddings_norms_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm((4, 4))
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    net, x = Tied().double(), torch.randn(3, 4).double()
    assert [row.name for row in convlora.adaptable(net)] == ["one", "two"]
    y0 = net(x)
    adapter = convlora.inject_lora(net)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    y1 = net(x)
    adapter.merge()
    torch.testing.assert_close(net(x), y1)  # each layer its own ΔW, though the frozen tensor is shared
    adapter.remove()
    assert torch.equal(net(x), y0) and net.one.weight is net.two.weight


def test_fully_trained_modules_are_left_out_of_the_low_rank_layers():
    net = dcgan()
    adapter = convlora.inject_lora(net, train=["6", "*.bias"])
    assert list(adapter.layers) == ["0", "3"]
    assert {"6.weight", "6.bias", "0.bias"} <= set(adapter.trained)
    values = sum(p.numel() for name, p in dcgan().named_parameters() if name in adapter.trained)
    assert adapter.num_trainable == adapter.num_parameters + values


@settings(max_examples=30, deadline=None)
@given(
    outputs=st.integers(1, 9), inputs=st.integers(1, 6), kernel=st.integers(1, 3), rank=st.integers(1, 4),
    alpha=st.floats(0.1, 16), relative=st.booleans(), transposed=st.booleans(),
)  # fmt: skip
def test_delta_is_scaled_low_rank_and_merge_is_undone(outputs, inputs, kernel, rank, alpha, relative, transposed):
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(inputs, outputs, kernel).double()
    matrix = conv.weight.detach().flatten(1)
    rank = min(rank, *matrix.shape)
    original = conv.weight
    adapter = convlora.inject_lora(conv, rank=rank, alpha=alpha, relative=relative)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    state = adapter.state_dict()
    scale = alpha / rank
    if relative:
        scale *= float(matrix.square().mean().sqrt()) * (3 * matrix.shape[1]) ** 0.5
    torch.testing.assert_close(adapter.delta("").flatten(1), scale * state["/B"] @ state["/A"])
    assert torch.linalg.matrix_rank(adapter.delta("").flatten(1)) <= rank
    adapter.merge()
    adapter.unmerge()
    adapter.remove()
    assert conv.weight is original and type(conv) in (nn.Conv2d, nn.ConvTranspose2d)


def test_relative_scale_makes_updates_alike_for_small_and_large_weights():
    """The same step on B moves a unit-variance weight as much, relative to itself, as a Kaiming-sized one."""
    ratios = []
    for gain in (1.0, 118.0):
        conv = nn.Conv2d(64, 8, 3)
        with torch.no_grad():
            conv.weight.mul_(gain)
        adapter = convlora.inject_lora(conv)
        with torch.no_grad():
            torch.manual_seed(3)
            for name, p in adapter.named_parameters():
                p.copy_(torch.randn_like(p) * (0.01 if name == "/B" else 1))
        ratios.append(float(adapter.delta("").detach().norm() / conv._parameters["weight"].norm()))
    assert ratios[0] == pytest.approx(ratios[1], rel=0.05)


def test_dropout_takes_no_part_in_merging_nor_in_delta(randomize):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double().eval()
    adapter = convlora.inject(net, "lora", rank=2, dropout=0.5)
    assert not adapter.layers["0"].training, "a change takes the mode of its model"
    randomize(adapter)
    x = torch.randn(2, 3, 6, 6).double()
    expected, delta = net(x), adapter.delta("0")
    net.train()
    torch.testing.assert_close(adapter.delta("0"), delta)
    assert not torch.equal(net(x), expected), "in training there is dropout"
    assert adapter.layers["0"].training
    adapter.merge()
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-9)


def test_looking_at_a_spectral_norm_in_training_does_not_advance_it():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    convlora.adaptable(net)
    adapter = convlora.inject_lora(net)
    adapter.remove()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[0].parametrizations.training


def test_biases_and_affines_have_presets_and_reload(tmp_path):
    def build():
        torch.manual_seed(3)
        net = nn.ModuleDict({"affine": nn.Linear(3, 4), "conv": nn.Conv2d(4, 4, 1)})
        return net

    net = build()
    biases = convlora.inject(net, "bias_only", name="biases")
    assert sorted(biases.trained) == ["affine.bias", "conv.bias"] and not biases.layers
    affine = convlora.inject(net, "affine_only", name="affines")
    assert list(affine.layers) == ["affine"] and affine.method == "full" and affine.num_parameters == 12
    with torch.no_grad():
        for adapter in (biases, affine):
            for parameter in adapter.parameters():
                parameter.add_(1)
    fresh = build()
    for adapter in (biases, affine):
        adapter.save(tmp_path / f"{adapter.name}.safetensors")
        convlora.load_adapter(fresh, tmp_path / f"{adapter.name}.safetensors", name=adapter.name)
    for layer, tensor in (("conv", "bias"), ("affine", "bias"), ("affine", "weight")):
        assert torch.equal(getattr(fresh[layer], tensor), getattr(net[layer], tensor))
