"""loralib's state dicts: the same function, from exact factors or in its own layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import convlora
from convlora import convert


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"conv": nn.Conv2d(4, 6, 3), "fc": nn.Linear(5, 7), "grouped": nn.Conv2d(4, 6, 3, groups=2)}
    ).eval()


def state(r: int = 2) -> dict[str, torch.Tensor]:
    """As `loralib.lora_state_dict` gives it: A (r·k, in·k), B (out/groups·k, r·k)."""
    g = torch.Generator().manual_seed(3)
    shapes = {
        "conv.lora_A": (r * 3, 4 * 3), "conv.lora_B": (6 * 3, r * 3), "fc.lora_A": (r, 5), "fc.lora_B": (7, r),
        "grouped.lora_A": (r * 3, 4 * 3), "grouped.lora_B": (6 // 2 * 3, r * 3),
    }  # fmt: skip
    return {key: torch.randn(shape, generator=g) for key, shape in shapes.items()}


def view(tensors, layer: str, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """What loralib's layer adds to its weight."""
    return (tensors[f"{layer}.lora_B"] @ tensors[f"{layer}.lora_A"]).view(weight.shape) * scale


@pytest.mark.parametrize("keep_layout", [False, True])
def test_the_change_is_loralibs(keep_layout) -> None:
    model, tensors = net(), state()
    if keep_layout:  # one layout option serves all layers
        tensors = {key: tensor for key, tensor in tensors.items() if "grouped" not in key}
    adapter = convert.from_loralib(model, tensors, alpha=3, r=2, keep_layout=keep_layout)
    assert adapter.method == ("loralib_view" if keep_layout else "lora")
    for layer in adapter.layers:
        expected = view(tensors, layer, net()[layer].weight, 3 / 2)
        torch.testing.assert_close(adapter.delta(layer), expected, rtol=1e-6, atol=1e-6)
        assert expected.norm() > 1


def test_rank_r_of_loralib_is_r_times_k_squared_here(tmp_path) -> None:
    adapter = convert.from_loralib(net(), state(1), alpha=1)
    assert {layer: change.A.shape[0] for layer, change in adapter.layers.items()} == {
        "conv": 9, "fc": 1, "grouped": 18,
    }  # fmt: skip
    assert torch.linalg.matrix_rank(adapter.delta("conv").detach().flatten(1)) == 6  # as much as 6 outputs can have
    adapter.save(tmp_path / "me.safetensors")
    assert torch.equal(convlora.load_adapter(net(), tmp_path / "me.safetensors").delta("conv"), adapter.delta("conv"))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_the_conversion_is_exact_for_any_groups_and_kernel(groups, a, b, k, r) -> None:
    conv = nn.Conv2d(a * groups, b * groups, k, groups=groups, bias=False).double()
    g = torch.Generator().manual_seed(a + 4 * b)
    tensors = {
        "0.lora_A": torch.randn(r * k, a * groups * k, generator=g, dtype=torch.float64),
        "0.lora_B": torch.randn(b * k, r * k, generator=g, dtype=torch.float64),
    }
    adapter = convert.from_loralib(nn.Sequential(conv), tensors, alpha=r)
    torch.testing.assert_close(adapter.delta("0"), view(tensors, "0", conv.weight, 1), rtol=0, atol=1e-13)


def test_a_kept_layout_of_a_grouped_convolution_can_be_exported_as_factors(tmp_path) -> None:
    tensors = {key: tensor for key, tensor in state().items() if "grouped" in key}
    adapter = convert.from_loralib(net(), tensors, alpha=1, keep_layout=True)
    expected = view(tensors, "grouped", net()["grouped"].weight, 1 / 2)
    torch.testing.assert_close(adapter.delta("grouped"), expected)
    again = convert.from_kohya(net(), convert.to_kohya(adapter, tmp_path / "a.safetensors"))
    torch.testing.assert_close(again.delta("grouped"), expected)


def test_a_safetensors_file_trained_biases_and_alpha_per_layer_are_read(tmp_path) -> None:
    tensors = state() | {"conv.conv.bias": torch.arange(6.0), "fc.bias": torch.arange(7.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    model = net()
    adapter = convert.from_loralib(model, tmp_path / "lora.safetensors", alpha={"conv": 4, "*": 1})
    torch.testing.assert_close(model["conv"].bias.detach(), torch.arange(6.0))
    torch.testing.assert_close(model["fc"].bias.detach(), torch.arange(7.0))
    torch.testing.assert_close(adapter.delta("conv"), view(tensors, "conv", net()["conv"].weight, 2))
    torch.testing.assert_close(adapter.delta("fc"), view(tensors, "fc", net()["fc"].weight, 0.5))


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        ({"conv.conv.weight": torch.ones(6, 4, 3, 3)}, {}, "count twice"),
        ({"other.lora_A": torch.ones(1, 1), "other.lora_B": torch.ones(1, 1)}, {}, "'other'"),
        ({"conv.lora_B": torch.ones(3, 6)}, {}, "where loralib's rank 2"),
        ({}, {"r": 3}, "where loralib's rank 3"),
        ({}, {"alpha": {"nothing": 1}}, "matches none"),
        ({}, {"alpha": {"conv": 1}}, "says nothing for"),
        ({}, {"keep_layout": True}, "same groups"),
        ({"conv.lora_A": torch.full((6, 12), torch.nan)}, {}, "NaN"),
        ({"nobody.bias": torch.ones(3)}, {}, "'nobody.bias'"),
    ],
)
def test_what_is_not_loralibs_is_refused_and_the_model_stays_as_it_was(change, options, match) -> None:
    model = net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(convlora.ConvloraError, match=match):
        convert.from_loralib(model, state() | change, **{"alpha": 1, **options})
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert convlora.Adapter.names(model) == []


def test_half_a_layer_and_a_pickle_are_refused(tmp_path) -> None:
    tensors = state()
    del tensors["fc.lora_B"]
    with pytest.raises(convlora.ConvloraError, match="other half"):
        convert.from_loralib(net(), tensors, alpha=1)
    torch.save(state(), tmp_path / "lora.pt")
    with pytest.raises(convlora.ConvloraError, match="lora.pt"):
        convert.from_loralib(net(), tmp_path / "lora.pt", alpha=1)
