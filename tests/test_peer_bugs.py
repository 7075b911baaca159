"""Bugs that other adapter libraries have or had on convolutions, one test each; ours must not have them.

Those that concern every layer kind (transposed, dilated, grouped, padding modes, normalised, subclassed layers; the
promised rank) are tested in test_layer_kinds.py; wrong files in test_malformed_files.py; vocoders with weight
normalisation in test_foreign_models.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convlora


class RawConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...] = (3, 3)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *kernel))

    def forward(self, x):
        return F.conv2d(x, self.weight) if self.weight.ndim == 4 else F.linear(x, self.weight)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel"),
    [(12, 24, (3, 3)), (24, 12, (3, 3)), (12, 24, (1, 1)), (16, 24, ()), (6, 8, (1, 5))],
)
def test_raw_weights_do_not_swap_inputs_and_outputs(inputs, outputs, kernel, randomize):
    """LyCORIS `parametrize`: twice the rank on 24×12 convolutions, full rank on affines, kw passed as a stride."""
    net = RawConv(inputs, outputs, kernel)
    adapter = convlora.inject_lora(net, rank=4)
    randomize(adapter)
    shapes = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    assert shapes["/A"] == (4, net.weight[0].numel()) and shapes["/B"] == (outputs, 4)
    assert torch.linalg.matrix_rank(adapter.delta("").flatten(1)) == 4


def test_subclasses_with_a_constructor_of_their_own_are_not_rebuilt(randomize):
    """PEFT and LyCORIS call `type(layer)(in, out, …)`: a TypeError where the constructor differs."""

    class Block(nn.Conv2d):
        def __init__(self, width):
            super().__init__(width, width, 3, padding=1)
            self.gain = 0.3

        def forward(self, x):
            return F.conv2d(x, self.weight * self.gain, self.bias, padding=1)

    net, x = nn.Sequential(Block(4)).double(), torch.randn(2, 4, 5, 5).double()
    adapter = convlora.inject_lora(net, rank=2)
    randomize(adapter)
    y = net(x)
    assert net[0].gain == 0.3 and isinstance(net[0], Block) and isinstance(net[0], nn.Conv2d)
    adapter.merge()
    torch.testing.assert_close(net(x), y, rtol=1e-9, atol=1e-9)


def test_lazy_convolutions_are_adapted_once_they_know_their_shape(randomize):
    """PEFT crashes on LazyConv2d."""
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 1))
    assert [row.name for row in convlora.adaptable(net)] == ["1"]
    y = net(torch.ones(1, 2, 5, 5))
    adapter = convlora.inject_lora(net)
    assert list(adapter.layers) == ["0", "1"] and torch.equal(net(torch.ones(1, 2, 5, 5)), y)


def test_the_weight_read_from_outside_its_layer_is_the_adapted_one(randomize):
    """PEFT's wrapper shows the frozen weight to code that reads `layer.weight`, and loses the layer's attributes."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net[0].weight_gain = 0.5
    adapter = convlora.inject_lora(net)
    randomize(adapter)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(F.conv2d(x, net[0].weight, net[0].bias), net(x))
    assert net[0].weight_gain == 0.5 and net[0].out_channels == 4


def test_a_weight_of_the_model_itself_can_be_adapted(tmp_path, randomize):
    """Elsewhere a parameter that belongs to no submodule cannot be targeted."""
    net, twin = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    twin.load_state_dict(net.state_dict())
    adapter = convlora.inject_lora(net, targets=[""])
    randomize(adapter)
    convlora.load_adapter(twin, adapter.save(tmp_path / "a.safetensors"))
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(net(x), twin(x))


def test_names_that_differ_only_in_dots_and_underscores_stay_apart(tmp_path, randomize):
    """kohya and LyCORIS mangle `a.b_c` and `a_b.c` to one key: one of two layers is lost."""

    def make():
        torch.manual_seed(0)
        a, a_b = nn.ModuleDict({"b_c": nn.Conv2d(2, 3, 1)}), nn.ModuleDict({"c": nn.Conv2d(2, 3, 1)})
        return nn.ModuleDict({"a": a, "a_b": a_b})

    net, twin = make(), make()
    adapter = convlora.inject_lora(net)
    randomize(adapter)
    loaded = convlora.load_adapter(twin, adapter.save(tmp_path / "a.safetensors"))
    assert list(loaded.layers) == ["a.b_c", "a_b.c"]
    for layer in loaded.layers:
        assert torch.equal(loaded.delta(layer), adapter.delta(layer)) and adapter.delta(layer).abs().max() > 0
    assert not torch.equal(adapter.delta("a.b_c"), adapter.delta("a_b.c"))


def test_eval_does_not_merge_and_a_state_taken_there_does_not_count_twice(randomize):
    """loralib's eval() writes ΔW into the weight: its state dict, loaded for training, adds ΔW again."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)))

    net, x = make(), torch.randn(1, 3, 5, 5)
    adapter = convlora.inject_lora(net)
    randomize(adapter)
    y = net(x)
    assert torch.equal(net.eval()(x), y) and not adapter.merged
    state = {key: value.clone() for key, value in net.state_dict().items()}
    twin = make()
    convlora.inject_lora(twin)
    twin.load_state_dict(state)
    assert torch.equal(twin.train()(x), y)
    assert torch.equal(state["0.weight"], make()[0].weight)


def test_depthwise_layers_never_take_more_values_than_they_have(randomize):
    """PEFT #2202: A of a grouped layer spans all inputs there, so the adapter is larger than the layer."""
    for layer in (nn.Conv2d(32, 32, 3, groups=32), nn.Conv1d(32, 32, 4, groups=32), nn.Conv2d(32, 64, 3, groups=8)):
        adapter = convlora.inject_lora(layer, rank=1)
        assert adapter.num_parameters < layer._parameters["weight"].numel()


def test_depthwise_1d_convolutions_merge(randomize):
    """Falcon-H1 #13: the merge broadcast (2048, 1, 4) against (2048, 2048, 4); the trained model was lost."""
    layer, x = nn.Conv1d(16, 16, 4, groups=16, padding=3).double(), torch.randn(2, 16, 9).double()
    adapter = convlora.inject_lora(layer, rank=2)
    randomize(adapter)
    y = layer(x)
    adapter.merge(keep=False)
    assert layer.weight.shape == (16, 1, 4)
    torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)


def test_no_bias_appears_with_an_adapter():
    """PEFT #1013: every adapted convolution got a bias."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    adapter = convlora.inject_lora(net)
    assert net[0].bias is None and not any("bias" in name for name, _ in net.named_parameters())
    adapter.merge(keep=False)
    assert list(net.state_dict()) == ["0.weight"]


@pytest.mark.parametrize("rslora", [False, True])
def test_strength_is_a_factor_of_the_change_whatever_the_scaling(rslora, tmp_path, randomize):
    """PEFT #2733: set_scale recomputed alpha/rank where rsLoRA has alpha/√rank."""
    net = nn.Conv2d(8, 8, 3)
    adapter = convlora.inject(net, "lora", 4, alpha=6, rslora=rslora, relative=False)
    randomize(adapter)
    state, full = adapter.state_dict(), adapter.delta("").detach().clone()
    expected = (6 / 2 if rslora else 6 / 4) * state["/B"] @ state["/A"]
    torch.testing.assert_close(full.flatten(1), expected)
    adapter.set_strength(0.5)
    torch.testing.assert_close(adapter.delta(""), 0.5 * full)
    path = adapter.save(tmp_path / "half.safetensors")
    adapter.remove()
    torch.testing.assert_close(convlora.load_adapter(net, path).delta(""), 0.5 * full)


def test_frozen_means_frozen_and_other_layers_are_untouched():
    """My3DGen's forward turns requires_grad on for biases, affines and noise; minLoRA does not freeze at all."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    adapter = convlora.inject_lora(net, targets="0")
    net(torch.randn(1, 3, 5, 5)).sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {
        f"0.convlora.weight.default.{tensor}" for tensor in "AB"
    }
    assert type(net[1]) is nn.Conv2d
    before = {name: p.clone() for name, p in net.named_parameters() if "convlora" not in name}
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert all(torch.equal(dict(net.named_parameters())[name], value) for name, value in before.items())
    adapter.remove()


def test_settings_of_one_model_do_not_leak_to_the_next():
    """LyCORIS keeps its preset on the class: the next network is built with it."""
    one, two = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    convlora.inject_lora(one, rank=3, alpha=9)
    adapter = convlora.inject_lora(two)
    assert adapter.record.ranks == {"": (1, 1)} and adapter.options["alpha"] is None
    assert len(list(one.parameters())) == len(list(two.parameters())) == 4


def test_running_statistics_that_a_file_will_not_hold_are_told_of(tmp_path, recwarn):
    """PEFT #1732: BatchNorm's statistics drift in training mode and are not saved, in silence."""

    def trained(**options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4))
        adapter = convlora.inject_lora(net, **options)
        net(torch.randn(2, 3, 5, 5))
        return net, adapter

    net, adapter = trained()
    with pytest.warns(UserWarning, match="running statistics of 1 moved .*train="):
        adapter.save(tmp_path / "a.safetensors")
    trained(train=["1"])[1].save(tmp_path / "b.safetensors")  # in the file, so nothing to tell
    net.eval()
    adapter.remove()
    again = convlora.inject_lora(net)
    net(torch.randn(2, 3, 5, 5))
    again.save(tmp_path / "c.safetensors")
    assert not recwarn.list


def test_two_merges_and_two_unmerges_are_refused_not_counted_twice(randomize):
    """A second merge added ΔW once more in early PEFT (#637) and loralib (#61)."""
    layer = nn.Conv2d(3, 4, 3)
    weight = layer.weight.detach().clone()
    adapter = convlora.inject_lora(layer)
    randomize(adapter)
    delta = adapter.delta("").detach().clone()
    adapter.merge()
    with pytest.raises(convlora.ConvloraError, match="merged"):
        adapter.merge()
    torch.testing.assert_close(layer.weight.detach(), weight + delta)
    adapter.unmerge()
    with pytest.raises(convlora.ConvloraError, match="not merged"):
        adapter.unmerge()
    assert torch.equal(layer._parameters["weight"], weight)
