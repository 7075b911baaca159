"""The difference of two checkpoints as an adapter: as exact, as faithful or as small as was asked."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import convlora
from convlora import lowrank

Z = torch.randn(4, 8, 1, 1, generator=torch.Generator().manual_seed(0)).double()


def dcgan() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1), nn.Tanh(),
    ).double().eval()  # fmt: skip


def tuned_by(randomize, **options) -> nn.Module:
    """The network after an adapter was merged into it: its difference has known ranks."""
    net = dcgan()
    adapter = convlora.inject_lora(net, **options)
    randomize(adapter)
    adapter.merge(keep=False)
    return net


def noisy(seed: int = 0, *, size: float = 0.03) -> nn.Module:
    """The network after every weight was tuned in full, some layers more than others."""
    net = dcgan()
    torch.manual_seed(seed)
    with torch.no_grad():
        for place, layer in enumerate((net[0], net[3], net[6])):
            decay = torch.logspace(0, -2, min(layer.weight.flatten(1).shape)).double()
            U, _, V = torch.linalg.svd(torch.randn_like(layer.weight.flatten(1)), full_matrices=False)
            layer.weight += size * (place + 1) * ((U * decay) @ V).view_as(layer.weight)
    return net


def relative_squared_error(adapter: convlora.Adapter, tuned: nn.Module, base: nn.Module) -> tuple[float, float]:
    """(lost, whole): Σ‖ΔW − result‖²/‖W₀‖² and Σ‖ΔW‖²/‖W₀‖² over the layers of the three networks' first."""
    lost = whole = 0.0
    for layer in ("0", "3", "6"):
        w0 = base.get_submodule(layer)._parameters["weight"].detach()
        delta = tuned.get_submodule(layer).weight.detach() - w0
        left = delta - adapter.delta(layer).detach() if layer in adapter.layers else delta
        lost, whole = lost + float((left.norm() / w0.norm()) ** 2), whole + float((delta.norm() / w0.norm()) ** 2)
    return lost, whole


# ------------------------------------------------------------------------------------------------------- rank


def test_a_difference_of_known_rank_is_recovered_exactly_and_no_rank_is_wasted(randomize, tmp_path):
    tuned = tuned_by(randomize, rank=2, ranks={"3": 1, "*": 2}, targets=["0", "3"])
    base = dcgan()
    adapter = convlora.extract(tuned, base, rank=6)
    assert adapter.record.ranks == {"0": (2, 2), "3": (1, 1)}
    torch.testing.assert_close(base(Z), tuned(Z), rtol=1e-9, atol=1e-9)
    assert adapter.options["extracted"]["total"] < 1e-9
    adapter.save(tmp_path / "a.safetensors")
    fresh = dcgan()
    loaded = convlora.load_adapter(fresh, tmp_path / "a.safetensors")
    torch.testing.assert_close(fresh(Z), tuned(Z), rtol=1e-9, atol=1e-9)
    assert loaded.options["extracted"] == adapter.options["extracted"]
    adapter.remove()
    assert torch.equal(base(Z), dcgan()(Z))


def test_rounding_in_float32_is_not_taken_for_a_change_of_full_rank(randomize):
    tuned, base = tuned_by(randomize, rank=2).float(), dcgan().float()
    adapter = convlora.extract(tuned, base, energy=1.0)
    assert {rank for rank, _ in adapter.record.ranks.values()} == {2}


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 9), inn=st.integers(1, 7), kernel=st.sampled_from([(), (1,), (3,), (1, 1), (3, 2), (2, 1, 2)]),
    true=st.integers(1, 4), rank=st.integers(1, 6), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_at_any_rank_has_the_error_of_eckart_and_young(out, inn, kernel, true, rank, seed):
    torch.manual_seed(seed)
    kind = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][len(kernel)]
    base = nn.Sequential(kind(inn, out, kernel) if kernel else kind(inn, out)).double()
    tuned = copy.deepcopy(base)
    delta = torch.randn(out, true).double() @ torch.randn(true, inn * math.prod(kernel)).double()
    with torch.no_grad():
        tuned[0].weight += delta.view_as(tuned[0].weight)
    adapter = convlora.extract(tuned, base, rank)
    singular = torch.linalg.svdvals(delta)
    best = float(singular[rank:].norm())
    assert adapter.record.ranks["0"][0] == min(rank, true, *delta.shape)
    error = float((adapter.delta("0").detach().flatten(1) - delta).norm())
    assert math.isclose(error, best, abs_tol=1e-9)
    assert math.isclose(adapter.options["extracted"]["layers"]["0"], best / singular.norm(), rel_tol=1e-3, abs_tol=1e-9)


def test_a_large_layer_at_a_small_rank_is_decomposed_at_random_as_well_as_exactly():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(64, 256, 3, bias=False))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for strength in (8.0, 4.0, 2.0):
            tuned[0].weight += strength * 0.01 * (torch.randn(256, 1) @ torch.randn(1, 576)).view_as(tuned[0].weight)
        tuned[0].weight += 0.001 * torch.randn_like(tuned[0].weight)
    delta = (tuned[0].weight - base[0].weight).detach().flatten(1)
    adapter = convlora.extract(tuned, base, rank=3)
    randomly = float((adapter.delta("0").detach().flatten(1) - delta).norm())
    best = float(torch.linalg.svdvals(delta)[3:].norm())
    assert best <= randomly * (1 + 1e-5) and randomly < 1.001 * best
    reported = adapter.options["extracted"]["layers"]["0"]
    assert math.isclose(reported, randomly / delta.norm(), rel_tol=1e-3)
    again = convlora.extract(tuned, base, rank=3, name="again")
    assert torch.equal(again.layers["0"].A, adapter.layers["0"].A), "the seed is fixed"


def test_half_precision_checkpoints_are_compared_in_float32(randomize):
    tuned, base = tuned_by(randomize, rank=1, targets="3").to(torch.bfloat16), dcgan().to(torch.bfloat16)
    adapter = convlora.extract(tuned, base, rank=1)
    assert adapter.layers["3"].A.dtype == torch.float32
    delta = tuned[3].weight.float() - base[3]._parameters["weight"].float()
    assert (adapter.delta("3") - delta).norm() < 0.2 * delta.norm()


# ------------------------------------------------------------------------------------------------------ energy


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.9999])
def test_the_asked_energy_is_kept_and_not_much_more(energy):
    tuned, base = noisy(), dcgan()
    adapter = convlora.extract(tuned, base, energy=energy)
    lost, whole = relative_squared_error(adapter, tuned, base)
    assert 1 - lost / whole >= energy
    assert math.isclose(adapter.options["extracted"]["total"], math.sqrt(lost / whole), rel_tol=1e-3)
    worth = []  # of each layer's last direction: without one of them, less than was asked would be left
    for layer, change in adapter.layers.items():
        w0 = base.get_submodule(layer)._parameters["weight"].detach()
        sigma = lowrank.norm(lowrank.Factors(change.B.detach()[:, -1:], change.A.detach()[-1:]))
        worth.append((sigma / float(w0.norm())) ** 2)
    assert any(1 - (lost + last) / whole < energy for last in worth)


def test_more_energy_takes_more_values_and_all_of_it_is_exact():
    sizes = []
    for energy in (0.5, 0.9, 0.99, 0.999):
        sizes.append(convlora.extract(noisy(), dcgan(), energy=energy).num_parameters)
    assert sizes == sorted(set(sizes))
    base, tuned = dcgan(), noisy()
    convlora.extract(tuned, base, energy=1.0)
    torch.testing.assert_close(base(Z), tuned(Z), rtol=1e-9, atol=1e-9)


def test_ranks_go_where_the_change_is_large_beside_the_weight():
    base, tuned = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), None
    with torch.no_grad():
        base[1].weight *= 1000
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in tuned:
            layer.weight += torch.randn(6, 1).double() @ torch.randn(1, 6).double()
    adapter = convlora.extract(tuned, base, energy=0.9)
    assert list(adapter.layers) == ["0"]
    assert adapter.options["extracted"]["layers"]["1"] == 1.0


# ------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("budget", [2600, 5000, 9000, 20000, 60000])
def test_the_file_stays_under_the_budget_and_uses_it(budget, dtype, tmp_path):
    tuned, base = noisy(), dcgan().float()
    adapter = convlora.extract(tuned.float(), base, bytes=budget, dtype=dtype)
    size = adapter.save(tmp_path / "a.safetensors", dtype=dtype).stat().st_size
    assert size <= budget
    if adapter.options["extracted"]["total"] > 1e-5:  # not everything fits
        itemsize = 4 if dtype is None else 2
        cheapest = min(sum(side.shape) for side in [base[6]._parameters["weight"].flatten(1)]) * itemsize
        assert size > budget - cheapest - 400, "room for another direction of the cheapest layer was left"


def test_a_larger_budget_is_never_worse():
    errors = []
    for budget in (3000, 6000, 12000, 24000):
        errors.append(convlora.extract(noisy(), dcgan(), bytes=budget).options["extracted"]["total"])
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]


def test_a_budget_that_is_too_small_says_how_much_it_takes(tmp_path):
    base = dcgan()
    with pytest.raises(convlora.ConvloraError, match="without any layer the file already has"):
        convlora.extract(noisy(), base, bytes=300)
    with pytest.raises(convlora.ConvloraError, match="is not enough: the smallest adapter") as caught:
        convlora.extract(noisy(), base, bytes=1200)
    least = int(str(caught.value).rpartition("has ")[2].split()[0])
    adapter = convlora.extract(noisy(), base, bytes=least)
    assert adapter.save(tmp_path / "a.safetensors").stat().st_size <= least
    with pytest.raises(convlora.ConvloraError, match="not enough"):
        convlora.extract(noisy(), dcgan(), bytes=least - 1)


# --------------------------------------------------------------------------------------------- the other tensors


def test_what_else_changed_is_listed_or_taken_over_on_request(tmp_path):
    tuned, base = noisy(), dcgan()
    with torch.no_grad():
        tuned[6].bias += 0.1
        tuned[4].weight *= 1.5
        tuned[4].running_mean += 0.2
    adapter = convlora.extract(tuned, base, energy=1.0, targets=["0", "3"])
    assert set(adapter.options["extracted"]["left_out"]) == {"6.weight", "6.bias", "4.weight", "4.running_mean"}
    assert adapter.options["extracted"]["left_out"]["4.weight"] == pytest.approx(0.5)
    json.dumps(adapter.options)
    adapter.remove()
    adapter = convlora.extract(tuned, base, energy=1.0, train=["*.bias", "4"])
    assert set(adapter.trained) == {"6.bias", "4.weight"}, "tensors that did not change are not taken"
    assert adapter.record.buffers == ["4.running_mean"] and not adapter.options["extracted"]["left_out"]
    torch.testing.assert_close(base(Z), tuned(Z), rtol=1e-9, atol=1e-9)
    adapter.save(tmp_path / "a.safetensors")
    adapter.remove()
    assert torch.equal(base(Z), dcgan()(Z))
    convlora.load_adapter(base, tmp_path / "a.safetensors")
    torch.testing.assert_close(base(Z), tuned(Z), rtol=1e-9, atol=1e-9)


def test_only_biases_changed_and_were_asked_for(tmp_path):
    tuned, base = dcgan(), dcgan()
    with torch.no_grad():
        tuned[6].bias += 0.1
    with pytest.raises(convlora.ConvloraError, match=r"do not differ in the selected layers.*6\.bias differ"):
        convlora.extract(tuned, base, rank=1)
    adapter = convlora.extract(tuned, base, bytes=3000, train="6.bias")
    assert torch.equal(base(Z), tuned(Z)) and not adapter.layers
    assert adapter.save(tmp_path / "a.safetensors").stat().st_size <= 3000


def test_normalised_and_raw_weights_are_extracted_below_the_normalisation(randomize):
    base = nn.Sequential(weight_norm(nn.Conv1d(4, 4, 3)), nn.Linear(4, 4)).double()
    tuned = copy.deepcopy(base)
    adapter = convlora.inject_lora(tuned, rank=1)
    randomize(adapter)
    adapter.merge(keep=False)
    x = torch.randn(2, 4, 6).double()
    convlora.extract(tuned, base, rank=1)
    torch.testing.assert_close(base(x), tuned(x), rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------- refusals


def with_nan() -> nn.Module:
    net = noisy()
    with torch.no_grad():
        net[3].weight[0, 0, 0, 0] = torch.nan
    return net


def with_adapter() -> nn.Module:
    net = noisy()
    convlora.inject_lora(net)
    return net


@pytest.mark.parametrize(
    ("tuned", "options", "message"),
    [
        (dcgan, {"rank": 1}, "do not differ in the selected layers, so there is no adapter$"),
        (noisy, {}, "one of rank, energy and bytes, not none"),
        (noisy, {"rank": 1, "energy": 0.5}, "not rank and energy"),
        (noisy, {"rank": 0}, "from 1 on, not 0"),
        (noisy, {"energy": 1.5}, "0 < energy ≤ 1, not 1.5"),
        (noisy, {"bytes": 0.5}, "whole number from 1 on, not 0.5"),
        (noisy, {"rank": 1, "targets": "x*"}, "matches no adaptable layer"),
        (noisy, {"rank": 1, "train": "x*"}, "matches no parameter"),
        (noisy, {"rank": 1, "name": "a b"}, "plain word"),
        (with_nan, {"rank": 1}, "layer '3': the difference .* not finite"),
        (with_adapter, {"rank": 1}, "the tuned model has adapter 'default': merge"),
        (lambda: dcgan()[:4], {"rank": 1}, r"differ in structure: only the base has \['4.weight'"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(8, 9, 4), *dcgan()[1:]), {"rank": 1}, r"0\.weight is \[8, 16, 4, 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_extracted_says_why_and_leaves_the_base_alone(tuned, options, message):
    base = dcgan()
    with pytest.raises(convlora.ConvloraError, match=message):
        convlora.extract(tuned(), base, **options)
    assert torch.equal(base(Z), dcgan()(Z)) and convlora.Adapter.names(base) == []
    assert all(p.requires_grad for p in base.parameters())
