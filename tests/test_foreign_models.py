"""Generators that convlora was not written for: every layer found, exact from the start to the removal."""

from __future__ import annotations

import copy

import foreign
import pytest
import torch
import torch.nn.functional as F
from foreign import FAMILIES
from torch import nn

import convlora


@pytest.mark.parametrize("family", FAMILIES)
def test_every_convolution_of_a_foreign_generator_is_found_and_nothing_else(family):
    net, _ = foreign.build(family)
    expected = {name for name, module in net.named_modules() if isinstance(module, FAMILIES[family].layers)}
    assert {row.name for row in convlora.adaptable(net)} == expected and expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_generator_is_adapted_merged_saved_and_restored(family, tmp_path, randomize):
    net, x = foreign.build(family)
    before, classes = copy.deepcopy(net.state_dict()), [type(module) for module in net.modules()]
    y0 = net(x).detach()
    adapter = convlora.inject_lora(net, rank=1 if family.startswith("hifigan") else 2)  # its last layer has one output
    assert torch.equal(net(x), y0), "identity at the start is bit-exact"
    assert [key for key in net.state_dict() if "convlora" not in key] == list(before)

    randomize(adapter)
    y1 = net(x).detach()
    assert not torch.allclose(y1, y0)
    adapter.merge()
    torch.testing.assert_close(net(x), y1, rtol=1e-9, atol=1e-9)
    assert list(net.state_dict()) == list(before) and [type(module) for module in net.modules()] == classes
    adapter.unmerge()
    assert torch.equal(net(x), y1), "unmerge is bit-exact"

    path = adapter.save(tmp_path / "a.safetensors")
    fresh, _ = foreign.build(family)
    loaded = convlora.load_adapter(fresh, path)
    assert torch.equal(fresh(x), y1), "a file gives the same outputs, bit for bit"
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in adapter.state_dict().items())

    adapter.remove()
    assert torch.equal(net(x), y0) and [type(module) for module in net.modules()] == classes
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_generator_trains_in_training_mode(family):
    net, x = foreign.build(family)
    target = net(x).detach().roll(1, 0)
    net.train()
    adapter = convlora.inject_lora(net, rank=1)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # A convolution's bias in front of a normalisation gets no gradient, but every adapted weight does.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    moved = [layer for layer, change in adapter.layers.items() if change.B.abs().max() > 0]
    assert moved == list(adapter.layers)
    assert losses[-1] < losses[0]


def test_a_modulated_weight_with_its_batch_dimension_in_front_is_a_matrix_of_outputs(randomize):
    """Seen as one row, a (1, out, in, k, k) weight would take any ΔW at "rank 1", with as many values as in full."""
    net, _ = foreign.build("rosinality")
    rows = {row.name: row for row in convlora.adaptable(net)}
    assert rows["conv1"].matrix == (8, 72) and rows["conv1"].shape == (1, 8, 8, 3, 3)
    assert rows["to_rgb"].matrix == (3, 6) and rows["refine"].matrix == (3, 27)
    adapter = convlora.inject_lora(net, rank=2)
    assert adapter.layers["conv1"].A.shape == (2, 72) and adapter.layers["conv1"].B.shape == (8, 2)
    randomize(adapter)
    delta = adapter.delta("conv1")
    assert delta.shape == net.conv1.weight.shape and torch.linalg.matrix_rank(delta[0].flatten(1)) == 2
    adapter.remove()
    code = convlora.inject_lora(net, rank=1, rank_per="kernel", targets="conv1")
    assert code.layers["conv1"].A.shape == (3, 72), "the kernel's side is 3, not the number of inputs"
    assert "8 × 72" in code.summary()


@pytest.mark.parametrize("conv", [nn.Conv3d(4, 1, 3), nn.Conv3d(4, 1, (1, 3, 3)), nn.ConvTranspose3d(1, 4, (1, 3, 3))])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_3d_convolution_to_one_channel_is_not_taken_for_one(conv, normalised):
    conv = nn.utils.parametrizations.weight_norm(conv) if normalised else conv
    (row,) = convlora.adaptable(conv)
    assert row.matrix == (1, conv.weight[0].numel())
    convlora.inject_lora(conv, rank=1).remove()


def test_weight_norm_taken_off_after_a_merge_keeps_the_adapted_sound(randomize):
    """Vocoders drop their weight normalisation for inference: peers' merge is a silent no-op before it."""
    net, x = foreign.build("hifigan_old")
    adapter = convlora.inject_lora(net, rank=1)
    randomize(adapter)
    y = net(x).detach()
    adapter.merge(keep=False)
    for module in net.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    torch.testing.assert_close(net(x), y, rtol=1e-9, atol=1e-9)
    assert not any("weight_v" in name for name, _ in net.named_parameters())


def test_running_buffers_of_a_foreign_layer_stay_buffers_of_the_base():
    """StyleGAN3's magnitude_ema moves in training, adapter or not; it is under its own key and not in the adapter."""
    net, x = foreign.build("stylegan3")
    adapter = convlora.inject_lora(net, rank=1)
    before = net.L0.magnitude_ema.clone()
    net.train()(x)
    assert not torch.equal(net.L0.magnitude_ema, before)
    assert not any("magnitude_ema" in key for key in adapter.state_dict())
    assert "L0.magnitude_ema" in net.state_dict()


class Dynamic(nn.Module):
    """Keeps its weight under another name, and a second tensor that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.positions = nn.Parameter(torch.randn(9, 9))

    def forward(self, x):
        return F.conv2d(x + self.positions, self.filters, padding=1)


def test_a_registered_parameter_name_is_adapted_merged_saved_and_restored(tmp_path, randomize):
    class Mine(Dynamic):
        pass

    torch.manual_seed(0)
    net = nn.Sequential(Mine(), nn.ReLU(), nn.Conv2d(6, 3, 1)).double()
    x = torch.randn(2, 4, 9, 9).double()
    assert [row.name for row in convlora.adaptable(net)] == ["2"]
    convlora.register_layer(Mine, parameter="filters")
    assert [row.name for row in convlora.adaptable(net)] == ["0", "2"]
    y0, twin = net(x), copy.deepcopy(net)
    adapter = convlora.inject_lora(net, rank=2)
    assert torch.equal(net(x), y0)
    randomize(adapter)
    y1 = net(x)
    convlora.load_adapter(twin, adapter.save(tmp_path / "a.safetensors"))
    assert torch.equal(twin(x), y1)
    adapter.merge()
    torch.testing.assert_close(net(x), y1, rtol=1e-9, atol=1e-9)
    adapter.remove()
    assert torch.equal(net(x), y0) and list(net.state_dict()) == ["0.filters", "0.positions", "2.weight", "2.bias"]


def test_a_registered_low_rank_forward_serves_a_parameter_of_another_name(randomize):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.filters, self.bias = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return F.conv2d(x, self.filters, self.bias)

    seen = []

    def low_rank(module, weight, x):
        seen.append(weight.left.shape)
        hidden = F.conv2d(x, weight.right.view(-1, *weight.base.shape[1:]))
        return F.conv2d(x, weight.base, module.bias) + F.conv2d(hidden, weight.left[:, :, None, None])

    convlora.register_layer(Plain, parameter="filters", low_rank=low_rank)
    net, x = nn.Sequential(Plain()).double(), torch.randn(2, 4, 7, 7).double()
    other = copy.deepcopy(net)
    fast = convlora.inject_lora(net, rank=2, path="low_rank", train=["0.bias"])
    slow = convlora.inject_lora(other, rank=2, path="weight", train=["0.bias"])
    randomize(fast)
    slow.load_state_dict(fast.state_dict())
    y = net(x)
    assert seen == [(6, 2)]
    torch.testing.assert_close(other(x), y, rtol=1e-12, atol=1e-12)
    fast.merge()
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    fast.unmerge()
    assert torch.equal(net(x), y) and torch.equal(copy.deepcopy(net)(x), y) and len(seen) == 3
    fast.remove()
    assert type(net[0]) is Plain


def test_a_predicate_on_the_class_name_serves_networks_that_carry_their_own_classes():
    """Unpickled NVIDIA networks bring a copy of every class: isinstance fails, the name does not."""
    copied = type("KernelBank", (Dynamic,), {})
    convlora.register_layer(lambda module: type(module).__name__ == "KernelBank", parameter="filters")
    net = nn.Sequential(copied())
    adapter = convlora.inject_lora(net, rank=1)
    assert list(adapter.layers) == ["0"] and type(net[0]).__name__ == "KernelBank"
    assert convlora.Adapter.of(net).delta("0").shape == (6, 4, 3, 3)


def test_register_layer_refuses_what_it_could_never_match():
    for wrong in (3, int, None):
        with pytest.raises(convlora.ConvloraError, match="needs an nn.Module class or a predicate"):
            convlora.register_layer(wrong)
