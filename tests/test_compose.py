"""Several adapters into one, and one adapter's tensors in place of another's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convlora
from convlora import lowrank
from convlora.lowrank import Factors

Z = torch.randn(4, 8, 1, 1, generator=torch.Generator().manual_seed(0)).double()


def dcgan() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1), nn.Tanh(),
    ).double().eval()  # fmt: skip


def adapted(randomize, **adapters) -> tuple[nn.Module, dict[str, convlora.Adapter]]:
    """A network with adapters, given as `name=(method, {options})`, all with random values."""
    net, made = dcgan(), {}
    for name, (method, options) in adapters.items():
        made[name] = convlora.inject(net, method, name=name, **options)
        randomize(made[name])
    return net, made


def sum_of_deltas(sources, weights, layer: str) -> torch.Tensor:
    return sum(weights[name] * a.delta(layer).detach() for name, a in sources.items() if layer in a.layers)


METHODS = ["lora", "para", "deft", "lidb", "svdiff", "adalora", "dora", "tucker", "loha", "lokr", "separable", "full"]


# ------------------------------------------------------------------------------------------------- exact sums


@pytest.mark.parametrize("how", ["sum", "concat"])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_the_sum_of_the_deltas_whatever_the_methods(how, method, randomize):
    options = {"targets": ["0", "3"]}
    net, sources = adapted(
        randomize, a=("lora", {"rank": 2, "targets": ["3", "6"]}), b=(method, options), c=("lora", {"rank": 1})
    )
    sources["b"].set_strength(0.7)
    weights = {"a": 1.0, "b": 0.8, "c": -0.5}
    expected = {layer: sum_of_deltas(sources, weights, layer) for layer in ("0", "3", "6")}
    mix = convlora.compose(net, weights, how)
    assert list(mix.layers) == ["0", "3", "6"]
    for layer, delta in expected.items():
        torch.testing.assert_close(mix.delta(layer), delta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["sum", "concat", "svd"])
def test_the_network_computes_as_with_both_sources_and_the_sources_are_off(how, randomize, tmp_path):
    net, sources = adapted(
        randomize,
        a=("lora", {"rank": 2, "train": ["0.bias", "4"]}),
        b=("dora", {"rank": 1, "targets": ["3"], "train": ["0.bias", "6.bias"]}),
    )
    both = net(Z)
    options = {"rank": 16} if how == "svd" else {}
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, how, **options)
    assert not sources["a"].enabled and not sources["b"].enabled
    torch.testing.assert_close(net(Z), both, rtol=1e-9, atol=1e-9)
    mix.save(tmp_path / "mix.safetensors")
    fresh = dcgan()
    loaded = convlora.load_adapter(fresh, tmp_path / "mix.safetensors", "mix")
    torch.testing.assert_close(fresh(Z), both, rtol=1e-9, atol=1e-9)
    assert loaded.options["composed"] == {"how": how, "of": {"a": 1.0, "b": 1.0}}


def test_sources_stay_disabled_until_they_are_enabled_by_hand(randomize):
    net, sources = adapted(randomize, a=("lora", {}), b=("lora", {"train": ["4"]}))
    with sources["a"].disabled(), sources["b"].disabled():
        base = net(Z)
    both = net(Z)
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0})
    mix.remove()
    assert torch.equal(net(Z), base)
    convlora.Adapter.of(net, "a").enable(), convlora.Adapter.of(net, "b").enable()
    assert torch.equal(net(Z), both)


@settings(deadline=None, max_examples=20)
@given(
    out=st.integers(1, 7), inn=st.integers(1, 6), kernel=st.sampled_from([(), (1,), (3,), (1, 1), (2, 3), (1, 1, 2)]),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 99),
)  # fmt: skip
def test_concat_and_sum_are_exact_on_any_shape_also_where_the_ranks_exceed_it(out, inn, kernel, ranks, seed):
    torch.manual_seed(seed)
    layer = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][len(kernel)]
    net = nn.Sequential(layer(inn, out, kernel) if kernel else layer(inn, out)).double()
    limit, sources = min(out, inn * math.prod(kernel)), {}
    for place, rank in enumerate(ranks):
        sources[f"s{place}"] = convlora.inject_lora(net, rank=min(rank, limit), name=f"s{place}", alpha=3)
        for parameter in sources[f"s{place}"].parameters():
            nn.init.normal_(parameter)
    weights = {name: float(place - 1.5) for place, name in enumerate(sources)}
    expected = sum_of_deltas(sources, weights, "0")
    for how in ("concat", "sum"):
        mix = convlora.compose(net, weights, how, name=how)
        torch.testing.assert_close(mix.delta("0"), expected, rtol=1e-9, atol=1e-9)
        assert mix.record.ranks["0"][0] <= limit


def test_sums_of_half_precision_models_are_made_in_float32(randomize):
    net = nn.Sequential(nn.Conv2d(8, 8, 3)).bfloat16()
    sources = {name: convlora.inject_lora(net, rank=2, name=name) for name in "ab"}
    for adapter in sources.values():
        randomize(adapter)
    expected = sum_of_deltas(sources, {"a": 1.0, "b": 0.5}, "0")
    mix = convlora.compose(net, {"a": 1.0, "b": 0.5})
    assert mix.layers["0"].B.dtype == torch.float32
    torch.testing.assert_close(mix.delta("0"), expected, rtol=1e-5, atol=1e-6)


def test_the_wide_batch_dimension_of_some_modulated_weights_is_no_row(randomize):
    class Modulated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 6, 4, 3, 3, dtype=torch.double))

    net = nn.Sequential(Modulated())
    a, b = (convlora.inject_lora(net, rank=2, name=name) for name in "ab")
    randomize(a), randomize(b)
    expected = a.delta("0") + b.delta("0")
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "svd", rank=4)
    assert mix.layers["0"].B.shape == (6, 4)
    torch.testing.assert_close(mix.delta("0"), expected, rtol=1e-9, atol=1e-9)
    assert convlora.conflict(a, b).layers[0].cosine is not None


# --------------------------------------------------------------------------------------- weights per layer


def test_weights_per_layer_and_first_match_wins(randomize):
    net, sources = adapted(randomize, a=("lora", {"rank": 1}), b=("lora", {"rank": 1}))
    mix = convlora.compose(net, {"a": {"3": 0.25, "[03]": 2.0}, "b": {"6": 1.0}})
    assert list(mix.layers) == ["0", "3", "6"]
    torch.testing.assert_close(mix.delta("0"), 2.0 * sources["a"].delta("0"))
    torch.testing.assert_close(mix.delta("3"), 0.25 * sources["a"].delta("3"))
    torch.testing.assert_close(mix.delta("6"), sources["b"].delta("6"))


def test_weight_zero_allocates_nothing(randomize):
    net, sources = adapted(randomize, a=("lora", {}), b=("lora", {}))
    sources["b"].set_strength({"6": 0.0})
    mix = convlora.compose(net, {"a": {"0": 1.0}, "b": {"[36]": 1.0}})
    assert list(mix.layers) == ["0", "3"]
    assert not any("mix" in name for name, _ in net.named_parameters() if name.startswith("6."))


def test_a_tensor_that_one_adapts_and_the_other_trains_in_full_is_one_layer(randomize):
    net, sources = adapted(
        randomize, a=("lora", {"rank": 1, "targets": ["6"]}), b=("lora", {"targets": ["0"], "train": ["6.weight"]})
    )
    both = net(Z)
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0})
    assert list(mix.layers) == ["0", "6"] and not mix.trained
    torch.testing.assert_close(net(Z), both, rtol=1e-9, atol=1e-9)


def test_trained_tensors_are_the_weighted_sum_of_their_differences(randomize):
    net, sources = adapted(randomize, a=("lora", {"train": ["6.bias"]}), b=("lora", {"train": ["6.bias"]}))
    base = net[6]._parameters["bias"].detach().clone()
    a, b = (adapter.trained["6.bias"].value.detach() - base for adapter in sources.values())
    mix = convlora.compose(net, {"a": 0.5, "b": {"6.bias": 2.0, "*": 1.0}})
    torch.testing.assert_close(mix.trained["6.bias"].value, base + 0.5 * a + 2.0 * b)


def test_buffers_of_one_source_are_taken_and_of_two_refused(randomize):
    net, sources = adapted(randomize, a=("lora", {"train": ["1"]}), b=("lora", {"train": ["1", "4"]}))
    sources["a"].disable()
    net[1].running_mean += 0.5  # b's, as training would have left it
    tuned = net(Z)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(convlora.ConvloraError, match=r"'a' and 'b' both have values for the buffer '1\.running_mean'"):
        convlora.compose(net, {"a": 1.0, "b": 1.0})
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert sources["b"].enabled and convlora.Adapter.names(net) == ["a", "b"]
    mix = convlora.compose(net, {"a": {"1.*": 0.0, "*": 0.0, "3": 1e-30}, "b": 1.0})
    torch.testing.assert_close(net(Z), tuned, rtol=1e-9, atol=1e-9)
    mix.remove()
    assert float(net[1].running_mean.abs().max()) == 0


# -------------------------------------------------------------------------------------------- recompression


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 12), cols=st.integers(1, 15), inner=st.integers(1, 8), rank=st.integers(1, 8),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_truncated_factors_reach_the_error_of_eckart_and_young(out, cols, inner, rank, seed):
    torch.manual_seed(seed)
    product = Factors(torch.randn(out, inner).double(), torch.randn(inner, cols).double())
    factors, error = lowrank.truncated(lowrank.svd(product), rank)
    singular = torch.linalg.svdvals(product.left @ product.right)
    best = float(singular[rank:].norm())
    true = float((product.left @ product.right - factors.left @ factors.right).norm())
    assert factors.rank <= rank
    assert math.isclose(true, best, abs_tol=1e-9) and math.isclose(error, best, abs_tol=1e-9)


def test_the_reported_truncation_is_the_true_one_per_layer_and_in_total(randomize):
    net, sources = adapted(randomize, a=("lora", {"rank": 2}), b=("lora", {"rank": 3}))
    weights = {"a": 1.0, "b": 0.5}
    exact = {layer: sum_of_deltas(sources, weights, layer) for layer in ("0", "3", "6")}
    mix = convlora.compose(net, weights, "svd", rank=2)
    lost = {layer: (exact[layer] - mix.delta(layer).detach()).norm() for layer in exact}
    report = mix.options["truncation"]
    for layer, error in lost.items():
        assert math.isclose(report["layers"][layer], error / exact[layer].norm(), rel_tol=1e-9)
        best = torch.linalg.svdvals(exact[layer].flatten(1))[2:].norm()
        assert math.isclose(error, best, rel_tol=1e-9), "no matrix of rank 2 is nearer"
    total = torch.stack([*lost.values()]).norm() / torch.stack([e.norm() for e in exact.values()]).norm()
    assert math.isclose(report["total"], total, rel_tol=1e-9)


def test_svd_keeps_no_rank_that_the_sum_does_not_have(randomize):
    net, _ = adapted(randomize, a=("lora", {"rank": 1}), b=("lora", {"rank": 2}))
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "svd", rank=50)
    assert {rank for rank, _ in mix.record.ranks.values()} == {3}
    assert mix.options["truncation"]["total"] < 1e-9


# --------------------------------------------------------------------------- what goes wrong elsewhere


@pytest.mark.parametrize("how", ["concat", "svd", "sum"])
def test_rslora_is_not_scaled_again_when_adapters_are_combined(how, randomize):
    """PEFT 0.21.2 multiplies by √r: the result keeps use_rslora and gets its scale twice (peft#3449)."""
    net, sources = adapted(
        randomize,
        a=("lora", {"rank": 4, "rslora": True, "alpha": 8, "targets": "3"}),
        b=("lora", {"rank": 4, "rslora": True, "targets": "3"}),
    )
    expected = sum_of_deltas(sources, {"a": 1.0, "b": 1.0}, "3")
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, how, **({"rank": 8} if how == "svd" else {}))
    assert math.isclose(mix.delta("3").detach().norm() / expected.norm(), 1, rel_tol=1e-9)


@pytest.mark.parametrize("how", ["concat", "svd", "sum", "ties", "dare", "null_space"])
def test_one_adapter_alone_stays_what_it_is(how, randomize):
    """PEFT's combination of a single rsLoRA adapter with weight 1 doubles it at r = 4."""
    options = {"svd": {"rank": 4}, "ties": {"density": 0.2}, "dare": {"density": 0.2}}.get(how, {})
    net, _ = adapted(randomize, a=("lora", {"rank": 4, "rslora": True, "targets": ["0", "3"]}))
    alone = net(Z)
    convlora.compose(net, {"a": 1.0}, how, **options)
    torch.testing.assert_close(net(Z), alone, rtol=1e-9, atol=1e-9)


def test_a_weighted_sum_has_no_cross_terms(randomize):
    """PEFT's "linear" adds factors, √w₁B₁ + √w₂B₂ and the same of A: their product has the terms B₁A₂ and B₂A₁."""
    net, sources = adapted(randomize, a=("lora", {"rank": 2}), b=("lora", {"rank": 2}))
    one, two = (adapter.layers["3"] for adapter in sources.values())
    crossed = ((one.B + two.B) @ (one.scale * (one.A + two.A))).view_as(net[3].weight)
    expected = sum_of_deltas(sources, {"a": 1.0, "b": 1.0}, "3")
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(mix.delta("3"), expected, rtol=1e-9, atol=1e-9)
    assert (crossed - expected).norm() > 0.1 * expected.norm(), "the test would not see cross terms"


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(1, 1, 1), nn.Conv1d(4, 6, 3), nn.Conv3d(3, 4, 2), nn.Conv3d(3, 4, (1, 1, 3)), nn.Linear(1, 5)],
    ids=["one channel, 1×1", "Conv1d", "Conv3d", "Conv3d 1×1×3", "Linear from one"],
)  # fmt: skip
def test_svd_works_on_every_kind_of_convolution(layer, randomize):
    """PEFT's svd fails on Conv1d, Conv3d (peft#3769) and on a 1×1 convolution of one channel."""
    net = nn.Sequential(copy.deepcopy(layer)).double()
    sources = {name: convlora.inject_lora(net, rank=1, name=name) for name in "ab"}
    for adapter in sources.values():
        randomize(adapter)
    expected = sum_of_deltas(sources, {"a": 1.0, "b": 2.0}, "0")
    mix = convlora.compose(net, {"a": 1.0, "b": 2.0}, "svd", rank=2)
    torch.testing.assert_close(mix.delta("0"), expected, rtol=1e-9, atol=1e-9)


def test_alpha_and_different_ranks_count_when_adapters_are_combined(randomize):
    """cloneofsimo/lora#187 ignores alpha, kohya sd-scripts#2204 does not adapt it to the new rank."""
    options = {"targets": "0"}
    net, sources = adapted(
        randomize, a=("lora", {"rank": 1, "alpha": 16, **options}), b=("lora", {"rank": 4, "alpha": 0.5, **options})
    )
    expected = sum_of_deltas(sources, {"a": 1.0, "b": 1.0}, "0")
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "svd", rank=5)
    torch.testing.assert_close(mix.delta("0"), expected, rtol=1e-9, atol=1e-9)


def test_dropout_of_a_source_in_training_mode_does_not_reach_the_result(randomize):
    net, sources = adapted(randomize, a=("lora", {"rank": 2, "dropout": 0.5}))
    net.eval()  # injected changes start in training mode
    expected = sources["a"].delta("3")
    net.train()
    mix = convlora.compose(net, {"a": 1.0})
    torch.testing.assert_close(mix.delta("3"), expected, rtol=1e-9, atol=1e-9)
    assert sources["a"].layers["3"].training


# ---------------------------------------------------------------------------------------------- ties and dare


def dense_pair(a, b) -> tuple[nn.Module, dict[str, convlora.Adapter]]:
    net = nn.Sequential(nn.Linear(len(a), 1, bias=False)).double()
    adapters = {}
    for name, delta in (("a", a), ("b", b)):
        adapters[name] = convlora.inject(net, "full", name=name)
        with torch.no_grad():
            adapters[name].layers["0"].value += torch.tensor([delta])
    return net, adapters


def test_ties_trims_elects_signs_and_averages_those_that_agree():
    net, _ = dense_pair([4.0, -3.0, 2.0, 0.1], [2.0, 5.0, 0.2, -1.0])
    # kept of a: 4, −3, 2; of b: 2, 5, −1; signs +, +, +, −; agreeing: (4, 2), (5), (2), (−1)
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "ties", density=0.75)
    torch.testing.assert_close(mix.delta("0"), torch.tensor([[3.0, 5.0, 2.0, -1.0]]).double())


def test_ties_with_weights_elects_by_weighted_values():
    net, _ = dense_pair([1.0, 1.0], [-3.0, 2.0])
    mix = convlora.compose(net, {"a": 4.0, "b": 1.0}, "ties", density=1.0)
    torch.testing.assert_close(mix.delta("0"), torch.tensor([[4.0, 3.0]]).double())


def test_dare_drops_at_random_rescales_and_depends_on_the_seed_only():
    ones = [1.0] * 4000
    net, _ = dense_pair(ones, ones)
    seeds = {"one": 0, "again": 0, "other": 1}
    mixes = {n: convlora.compose(net, {"a": 1.0, "b": 1.0}, "dare", n, density=0.25, seed=s) for n, s in seeds.items()}
    one, again, other = (mix.delta("0").detach() for mix in mixes.values())
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert {round(v, 6) for v in one.flatten().tolist()} == {0.0, 4.0, 8.0}
    assert abs(float(one.mean()) - 2) < 0.2, "the expectation is the sum"


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_ties_and_dare_can_be_compressed_again(how, randomize):
    net, _ = adapted(randomize, a=("lora", {"rank": 2}), b=("lora", {"rank": 2}))
    whole = convlora.compose(net, {"a": 1.0, "b": 1.0}, how, density=0.5, name="whole")
    small = convlora.compose(net, {"a": 1.0, "b": 1.0}, how, density=0.5, rank=3, name="small")
    assert whole.method == "full" and small.method == "lora"
    exact, nearest = whole.delta("3").detach(), small.delta("3").detach()
    error = (exact - nearest).norm() / exact.norm()
    assert 0 < error and math.isclose(small.options["truncation"]["layers"]["3"], error, rel_tol=1e-6)


# ------------------------------------------------------------------------------------------------------ PaRa


def directions(adapter: convlora.Adapter, layer: str) -> torch.Tensor:
    return torch.linalg.qr(adapter.layers[layer].B.detach())[0]


def weight_of(net: nn.Module, layer: str) -> torch.Tensor:
    return net.get_submodule(layer).weight.detach().flatten(1)


def test_a_union_removes_all_directions_in_any_order(randomize):
    options = {"targets": ["0", "3"]}
    net, sources = adapted(
        randomize,
        a=("para", {"rank": 2, **options}),
        b=("para", {"rank": 1, **options}),
        c=("para", {"rank": 1, **options}),
    )
    with torch.no_grad():  # c repeats a direction of a, as far as it can be seen
        sources["c"].layers["0"].B.copy_(sources["a"].layers["0"].B[:, :1] * 3)
    one = convlora.compose(net, {"a": 1.0, "b": 1.0, "c": 1.0}, "para_union", name="one")
    for layer, rank in (("0", 3), ("3", 4)):
        assert one.record.ranks[layer] == (rank, rank)
        for source in sources.values():
            assert (directions(source, layer).mT @ weight_of(net, layer)).abs().max() < 1e-9
    forward = {layer: one.delta(layer) for layer in one.layers}
    other = convlora.compose(net, {"c": 1.0, "b": 1.0, "a": 1.0}, "para_union", name="other")
    for layer, delta in forward.items():
        torch.testing.assert_close(other.delta(layer), delta, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(
    out=st.integers(7, 12), cols=st.integers(3, 12), ranks=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_unions_of_any_shape_are_projections(out, cols, ranks, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(cols, out)).double()
    names = [f"p{place}" for place in range(len(ranks))]
    sources = [convlora.inject(net, "para", rank=rank, name=name) for name, rank in zip(names, ranks)]
    base = net[0]._parameters["weight"].detach()
    for order in (names, names[::-1]):
        mix = convlora.compose(net, dict.fromkeys(order, 1.0), "para_union")
        changed = base + mix.delta("0")
        for source in sources:
            assert (directions(source, "0").mT @ changed).abs().max() < 1e-9
        assert torch.linalg.matrix_rank(changed, atol=1e-9) == min(out - sum(ranks), cols)
        mix.remove()


def test_a_sequence_is_the_product_of_the_projections_in_order(randomize):
    net, sources = adapted(randomize, a=("para", {"rank": 2, "targets": "3"}), b=("para", {"rank": 1, "targets": "3"}))
    sources["a"].set_strength(0.5)
    base = net[3]._parameters["weight"].detach().flatten(1)
    P, R = (q @ q.mT for q in (directions(source, "3") for source in sources.values()))
    eye = torch.eye(len(base)).double()
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "para_sequential")
    torch.testing.assert_close(weight_of(net, "3"), (eye - R) @ (eye - 0.5 * P) @ base, rtol=1e-9, atol=1e-9)
    assert mix.method == "lora" and mix.record.ranks["3"] == (3, 3)
    assert (directions(sources["b"], "3").mT @ weight_of(net, "3")).abs().max() < 1e-9


def test_a_soft_union_has_one_strength_and_refuses_two(randomize, tmp_path):
    options = {"rank": 1, "targets": "3"}
    net, sources = adapted(randomize, a=("para", options), b=("para", options))
    mix = convlora.compose(net, {"a": 0.5, "b": 0.5}, "para_union")
    half = mix.delta("3")
    mix.set_strength(1.0)
    torch.testing.assert_close(mix.delta("3"), 2 * half)
    mix.remove()
    with pytest.raises(convlora.ConvloraError, match=r"different shares.*0\.5, 1\b"):
        convlora.compose(net, {"a": 0.5, "b": 1.0}, "para_union")
    mix = convlora.compose(net, {"a": 0.5, "b": 0.5}, "para_union")
    fresh = dcgan()
    mix.save(tmp_path / "mix.safetensors")
    loaded = convlora.load_adapter(fresh, tmp_path / "mix.safetensors")
    torch.testing.assert_close(loaded.delta("3"), half, rtol=1e-9, atol=1e-9)


def test_a_union_that_would_erase_a_layer_is_refused():
    net = nn.Sequential(nn.Linear(6, 4))
    for name in "abcd":
        convlora.inject(net, "para", rank=1, name=name)
    with pytest.raises(convlora.ConvloraError, match="all 4 output directions of layer '0'"):
        convlora.compose(net, dict.fromkeys("abcd", 1.0), "para_union")


def test_para_and_lora_add_as_changes_of_the_frozen_weight(randomize):
    net, sources = adapted(randomize, p=("para", {"rank": 1, "targets": "3"}), a=("lora", {"targets": "3"}))
    base, Q = net[3]._parameters["weight"].detach().flatten(1), directions(sources["p"], "3")
    expected = base - Q @ (Q.mT @ base) + sources["a"].delta("3").flatten(1)
    convlora.compose(net, {"p": 1.0, "a": 1.0})
    torch.testing.assert_close(weight_of(net, "3"), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(convlora.ConvloraError, match="'a' has a LoRA on layer '3'"):
        convlora.compose(net, {"p": 1.0, "a": 1.0}, "para_union", name="other")


# ------------------------------------------------------------------------------------------------- null space


@pytest.mark.parametrize("against", ["rows", "columns", "both"])
def test_the_null_space_of_the_first_adapter_keeps_what_it_does(against, randomize):
    net, sources = adapted(randomize, a=("lora", {"rank": 2, "targets": "3"}), b=("lora", {"rank": 3}))
    first = sources["a"].delta("3").flatten(1)
    U, _, V = (part[..., :2] for part in torch.linalg.svd(first)[:2]), None, torch.linalg.svd(first)[2][:2].mT
    columns = next(iter(U))
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "null_space", against=against)
    others = mix.delta("3").flatten(1) - first
    if against != "columns":
        assert (others @ V).abs().max() < 1e-9
    if against != "rows":
        assert (columns.mT @ others).abs().max() < 1e-9
    assert others.norm() > 0.1 * sources["b"].delta("3").norm()
    torch.testing.assert_close(mix.delta("0"), sources["b"].delta("0"), rtol=1e-9, atol=1e-9)


def test_a_soft_projection_keeps_a_share_of_the_overlap(randomize):
    net, sources = adapted(randomize, a=("lora", {"rank": 2, "targets": "3"}), b=("lora", {"rank": 3, "targets": "3"}))
    first, second = (sources[name].delta("3").flatten(1) for name in "ab")
    V = torch.linalg.svd(first)[2][:2].mT
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "null_space", soft=3.0)
    overlap = (mix.delta("3").flatten(1) - first) @ V
    torch.testing.assert_close(overlap, second @ V / 4, rtol=1e-9, atol=1e-9)
    mix.remove()
    mix = convlora.compose(net, {"a": 1.0, "b": 1.0}, "null_space", soft=0.0)
    torch.testing.assert_close(mix.delta("3").flatten(1), first + second, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"a": 1.0, "x": 1.0}, {}, "no adapter named 'x'"),
        ({}, {}, "compose needs weights"),
        ({"a": float("nan")}, {}, "finite number, not nan"),
        ({"a": True}, {}, "finite number, not True"),
        ({"a": "1"}, {}, "finite number, not '1'"),
        ({"a": {"9": 1.0}}, {}, r"'9' matches nothing of adapter 'a': 0, 3, 6"),
        ({"a": 0.0, "b": {"0": 0}}, {}, "nothing would be left"),
        ({"a": 1.0}, {"how": "linear"}, "how must be one of sum, concat"),
        ({"a": 1.0}, {"how": "svd"}, "needs the rank"),
        ({"a": 1.0}, {"how": "svd", "rank": 0}, "from 1 on, not 0"),
        ({"a": 1.0}, {"how": "concat", "rank": 2}, "no use for rank=2"),
        ({"a": 1.0}, {"how": "ties"}, "needs density"),
        ({"a": 1.0}, {"how": "dare", "density": 1.5}, "0 < density ≤ 1, not 1.5"),
        ({"a": 1.0}, {"how": "null_space", "against": "x"}, "against must be"),
        ({"a": 1.0}, {"how": "null_space", "soft": -1.0}, "soft is a μ from 0"),
        ({"a": 1.0}, {"name": "b"}, "already has an adapter named 'b'"),
        ({"a": 1.0, "m": 1.0}, {}, "'m' is merged"),
        ({"a": 1.0}, {"how": "para_union"}, "combines PaRa adapters only"),
    ],
)
def test_what_cannot_be_composed_says_why_and_changes_nothing(weights, options, message, randomize):
    net, sources = adapted(randomize, a=("lora", {}), b=("lora", {}), m=("lora", {"targets": "6"}))
    sources["m"].merge()
    before, y = list(net.state_dict()), net(Z)
    with pytest.raises(convlora.ConvloraError, match=message):
        convlora.compose(net, weights, **options)
    assert list(net.state_dict()) == before and torch.equal(net(Z), y)
    assert sources["a"].enabled and convlora.Adapter.names(net) == ["a", "b", "m"]


def test_whose_faces_are_in_a_mixture_stays_known_and_consent_for_one_does_not(randomize, tmp_path):
    net, sources = adapted(randomize, a=("lora", {}), b=("lora", {}))
    for name, adapter in sources.items():
        adapter.save(tmp_path / f"{name}.safetensors", base_model="me/gan", person=name.upper(), consent="yes")
    assert convlora.compose(net, {"a": 1.0}, name="one").record.metadata["consent"] == "yes"
    both = convlora.compose(net, {"a": 1.0, "b": 1.0}, name="both")
    assert both.record.metadata == {"base_model": "me/gan", "person": "A, B"}


# -------------------------------------------------------------------------------------------------- hot-swap


def two_files(folder, randomize, method="lora", small=None, **options):
    """The outputs of two adapters of one network, and their files `big` and `small`."""
    outputs = {}
    for name, own in (("big", options), ("small", options if small is None else small)):
        net = dcgan()
        adapter = convlora.inject(net, method, **own)
        randomize(adapter)
        for buffer in adapter.record.buffers:
            if buffer.endswith("mean"):
                net.get_buffer(buffer).add_(0.3)
        adapter.save(folder / f"{name}.safetensors", person=name)
        outputs[name] = net(Z)
    return outputs


def test_a_swap_gives_the_other_adapters_output_in_the_same_memory(randomize, tmp_path):
    outputs = two_files(tmp_path, randomize, rank=3, train=["4"], small={"rank": 1, "targets": ["0", "6"]})
    net = dcgan()
    adapter = convlora.load_adapter(net, tmp_path / "big.safetensors")
    addresses = {key: tensor.data_ptr() for key, tensor in adapter.state_dict().items()}
    adapter.set_strength(0.3)
    adapter.swap(tmp_path / "small.safetensors")
    torch.testing.assert_close(net(Z), outputs["small"], rtol=1e-9, atol=1e-9)
    adapter.swap(tmp_path / "big.safetensors")
    assert torch.equal(net(Z), outputs["big"])
    assert {key: tensor.data_ptr() for key, tensor in adapter.state_dict().items()} == addresses
    assert adapter.record.metadata["person"] == "big"


def load(path):
    return convlora.files.read(path)[0]


def test_a_swap_leaves_nothing_of_the_person_before(randomize, tmp_path):
    two_files(tmp_path, randomize, rank=3, small={"rank": 1, "targets": ["0"]})
    adapter = convlora.load_adapter(dcgan(), tmp_path / "big.safetensors")
    adapter.swap(tmp_path / "small.safetensors")
    small, now = load(tmp_path / "small.safetensors"), adapter.state_dict()
    assert adapter.record.metadata["person"] == "small"
    for key, tensor in now.items():
        values = set(tensor.flatten().tolist()) - {0.0}
        allowed = set(small[key].flatten().tolist()) if key in small else set()
        assert values <= allowed, key


def test_a_swap_takes_the_strengths_of_the_file(randomize, tmp_path):
    two_files(tmp_path, randomize, rank=1)
    net = dcgan()
    adapter = convlora.load_adapter(net, tmp_path / "small.safetensors")
    adapter.set_strength({"3": 0.25})
    half = net(Z)
    adapter.save(tmp_path / "soft.safetensors")
    adapter.swap(tmp_path / "big.safetensors")
    adapter.swap(tmp_path / "soft.safetensors")
    assert torch.equal(net(Z), half)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 4, 3, padding=1), nn.Linear(8, 4)],
    ids=["grouped", "transposed", "linear"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["weight", "low_rank"])
def test_a_swap_is_right_on_grouped_and_transposed_layers(layer, path, randomize):
    """PEFT's hot-swap of a grouped Conv2d gave silently wrong outputs (peft#3416)."""
    net = nn.Sequential(copy.deepcopy(layer)).double()
    x = torch.randn(2, 8).double() if isinstance(layer, nn.Linear) else torch.randn(2, 8, 5, 5).double()
    small = convlora.inject_lora(net, rank=1, path=path)
    randomize(small)
    state, expected = {k: v.clone() for k, v in small.state_dict().items()}, net(x)
    small.remove()
    big = convlora.inject_lora(net, rank=3, path=path)
    randomize(big)
    big.swap(state)
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_a_swap_compiles_nothing_again(randomize, tmp_path):
    two_files(tmp_path, randomize, rank=2, small={"rank": 1, "targets": ["0", "3"]})
    net = dcgan()
    adapter = convlora.load_adapter(net, tmp_path / "big.safetensors")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad():
        before = compiled(Z)
        for name in ("small", "big", "small"):
            adapter.swap(tmp_path / f"{name}.safetensors")
            torch.testing.assert_close(compiled(Z), net(Z), rtol=1e-9, atol=1e-9)
        assert not torch.equal(before, compiled(Z))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["para", "lidb", "dora", "lokr", "full"])
def test_other_methods_swap_between_equal_shapes(method, randomize, tmp_path):
    outputs = two_files(tmp_path, randomize, method, targets=["0", "3"])
    net = dcgan()
    adapter = convlora.load_adapter(net, tmp_path / "big.safetensors")
    adapter.swap(tmp_path / "small.safetensors")
    torch.testing.assert_close(net(Z), outputs["small"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        ({"rank": 1}, {"rank": 2}, r"layer '0' has rank 2, and there is room for 1"),
        ({"rank": 1, "targets": "0"}, {"rank": 1}, r"unexpected tensors \['3/"),
        ({"rank": 1}, {"rank": 1, "init": "pissa"}, "unexpected tensors"),
        ({"rank": 1, "method": "dora"}, {"rank": 1}, "is 'lora', adapter 'default' is 'dora'"),
        ({"rank": 1, "method": "lidb"}, {"rank": 1, "method": "lidb", "seed": 7}, "has seed=7 where"),
        ({"rank": 1, "method": "para"}, {"rank": 1, "method": "para", "targets": "0"}, "missing tensors"),
        ({"rank": 1}, {"rank": 1, "train": ["6.bias"]}, r"unexpected tensors \['train/6.bias'"),
    ],
    ids=["rank", "layer", "tensors", "method", "seed", "fewer layers", "trained"],
)
def test_a_swap_that_does_not_fit_says_why_and_changes_nothing(own, other, message, randomize, tmp_path):
    net = dcgan()
    donor = convlora.inject(net, other.pop("method", "lora"), **other)
    randomize(donor)
    donor.save(tmp_path / "other.safetensors")
    donor.remove()
    adapter = convlora.inject(net, own.pop("method", "lora"), **own)
    randomize(adapter)
    before, y = copy.deepcopy(adapter.state_dict()), net(Z)
    with pytest.raises(convlora.ConvloraError, match=message):
        adapter.swap(tmp_path / "other.safetensors")
    assert torch.equal(net(Z), y)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state_dict().items())


def test_a_swap_of_another_base_of_nan_and_while_merged_is_refused(randomize, tmp_path):
    two_files(tmp_path, randomize, rank=1)
    other = nn.Sequential(*dcgan())
    with torch.no_grad():
        other[0].weight.add_(1)
    adapter = convlora.inject_lora(other, rank=1)
    with pytest.raises(convlora.ConvloraError, match="another base model"):
        adapter.swap(tmp_path / "big.safetensors")
    state = {key: torch.full_like(tensor, torch.nan) for key, tensor in adapter.state_dict().items()}
    with pytest.raises(convlora.ConvloraError, match="NaN"):
        adapter.swap(state)
    adapter.merge()
    with pytest.raises(convlora.ConvloraError, match="is merged"):
        adapter.swap(tmp_path / "big.safetensors")
