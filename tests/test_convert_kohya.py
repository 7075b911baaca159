"""Adapters to and from kohya's and LyCORIS's files, compared with the real library's own forward."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
from convlora import convert

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lycoris = pytest.importorskip("lycoris")
    from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
FULL = {"target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"], "target_name": []}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8 * 4 * 4)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.body = nn.ModuleDict({"conv_in": nn.Conv2d(12, 8, 3, padding=2, dilation=2), "point": nn.Conv2d(8, 6, 1)})
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.line = nn.Conv1d(8, 5, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.fc(z).view(-1, 8, 4, 4)).relu()
        x = self.grouped(self.body["point"](self.body["conv_in"](x)))
        return self.line(x.flatten(2))


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(3, 6, generator=torch.Generator().manual_seed(5)))


@pytest.fixture(autouse=True)
def _preset():
    LycorisNetwork.apply_preset(FULL)  # a global of theirs


def saved_by_lycoris(file: Path, dim: int = 2, alpha: float = 3.0, scalar: float | None = None, **options):
    """A file of LyCORIS's own network with random values, and what the network computes."""
    model = net()
    network = create_lycoris(model, 1.0, linear_dim=dim, linear_alpha=alpha, preset="full", **options)
    LycorisNetwork.apply_preset(FULL)
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(torch.rand_like(parameter) * 0.3 if "dora" in name else torch.randn_like(parameter) * 0.3)
    expected = outputs(model)
    network.save_weights(str(file), torch.float32, {})
    return expected


def loaded_by_lycoris(file: Path) -> torch.Tensor:
    model = net()
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    assert len(network.loras) == len({key.partition(".")[0] for key in load_file(file)})  # theirs drops in silence
    network.apply_to()
    return outputs(model)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max()))
    assert (a - outputs(net())).abs().max() > 2e-3


ALGOS = {
    "locon": ("lora", {}),
    "tucker": ("tucker", {"use_tucker": True}),
    "scalar": ("lora", {"use_scalar": True}),
    "dora": ("dora", {"dora_wd": True}),
    "dora in": ("dora", {"dora_wd": True, "wd_on_output": False}),
    "dora tucker": ("dora", {"dora_wd": True, "use_tucker": True}),
    "loha": ("loha", {"algo": "loha"}),
    "loha tucker": ("loha", {"algo": "loha", "use_tucker": True}),
    "lokr": ("lokr", {"algo": "lokr"}),
    "lokr 2": ("lokr", {"algo": "lokr", "factor": 2, "dim": 1}),
    "lokr both": ("lokr", {"algo": "lokr", "decompose_both": True, "dim": 1}),
    "lokr full": ("lokr", {"algo": "lokr", "full_matrix": True}),
    "lokr tucker": ("lokr", {"algo": "lokr", "use_tucker": True, "dim": 1, "factor": 2}),
}
EXACT = [name for name in ALGOS if name not in ("dora tucker", "loha tucker", "lokr tucker")]  # others multiply out


@pytest.mark.parametrize("algo", ALGOS)
def test_an_adapter_from_lycoris_computes_what_lycoris_computes(algo, tmp_path) -> None:
    method, options = ALGOS[algo]
    expected = saved_by_lycoris(tmp_path / "theirs.safetensors", **options)
    model = net()
    adapter = convert.from_kohya(model, tmp_path / "theirs.safetensors")
    assert adapter.method == method
    assert len(adapter.layers) == 6
    close(outputs(model), expected)
    adapter.merge()
    close(outputs(model), expected)


@pytest.mark.parametrize("algo", EXACT)
def test_from_kohya_and_back_keeps_every_tensor_bit_for_bit(algo, tmp_path) -> None:
    expected = saved_by_lycoris(tmp_path / "theirs.safetensors", **ALGOS[algo][1])
    adapter = convert.from_kohya(net(), tmp_path / "theirs.safetensors")
    convert.to_kohya(adapter, tmp_path / "ours.safetensors")
    before, after = load_file(tmp_path / "theirs.safetensors"), load_file(tmp_path / "ours.safetensors")
    assert sorted(before) == sorted(after)
    both = {key.partition(".")[0] for key in before if key.endswith("lokr_w2")}
    free = {f"{stem}.alpha" for stem in both if f"{stem}.lokr_w1" in before}  # means nothing there
    assert all(torch.equal(before[key], after[key]) for key in set(before) - free)
    if algo != "dora in":  # which LyCORIS itself cannot load back
        close(loaded_by_lycoris(tmp_path / "ours.safetensors"), expected)


OURS = {
    "lora": {"method": "lora", "rank": 2, "alpha": 0.1},
    "rslora": {"method": "lora", "rank": 4, "rslora": True, "alpha": 3},
    "per layer": {"method": "lora", "rank": 2, "alpha": {"fc": 5, "*": 0.7}, "ranks": {"fc": 3, "line": 1, "*": 2}},
    "tucker": {"method": "tucker", "rank": 2, "alpha": 1},
    "dora": {"method": "dora", "rank": 2, "alpha": 1},
    "loha": {"method": "loha", "rank": 2, "alpha": 1},
    "lokr": {"method": "lokr", "rank": 1, "alpha": 3},
    "lokr full": {"method": "lokr", "rank": 4},
    "para": {"method": "para", "rank": 2},
    "deft": {"method": "deft", "rank": 2},
    "pissa": {"method": "lora", "rank": 2, "init": "pissa"},
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
def test_an_adapter_written_for_lycoris_computes_the_same_there(options, tmp_path, randomize) -> None:
    model = net()
    adapter = convlora.inject(model, **options)
    randomize(adapter)
    file = convert.to_kohya(adapter, tmp_path / "ours.safetensors")
    close(loaded_by_lycoris(file), outputs(model))
    again = net()
    convert.from_kohya(again, file)
    close(outputs(again), outputs(model))


@pytest.mark.parametrize("method", ["lora", "tucker", "loha", "lokr"])
def test_scale_and_tensors_survive_the_round_trip_bit_for_bit(method, tmp_path, randomize) -> None:
    adapter = convlora.inject(net(), method, 1, alpha=0.1)  # relative: every layer has a scale of its own
    randomize(adapter)
    convert.to_kohya(adapter, tmp_path / "ours.safetensors")
    own = adapter.state_dict()
    back = convert.from_kohya(net(), tmp_path / "ours.safetensors").state_dict()
    assert sorted(own) == sorted(back)
    folded = [key for key in own if key.endswith("/w1") and key.replace("w1", "w2") in own]
    free = {*folded, *(key.replace("/w1", "/scale") for key in folded)}  # LoKr in full: the scale goes into w1
    assert all(torch.equal(own[key], back[key]) for key in own.keys() - free)


@pytest.mark.parametrize("method", ["lora", "tucker", "loha", "lokr", "para"])
@pytest.mark.parametrize("strength", [0.0, -0.75])
def test_strength_goes_into_the_file_also_where_it_is_zero(method, strength, tmp_path, randomize) -> None:
    model = net()
    adapter = convlora.inject(model, method, 1, targets="conv")
    randomize(adapter)
    adapter.set_strength(strength)
    file = convert.to_kohya(adapter, tmp_path / "ours.safetensors")
    again = net()
    convert.from_kohya(again, file)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-5)


def test_alpha_that_is_missing_or_zero_means_the_rank(tmp_path) -> None:
    for alpha in ({}, {"lycoris_conv.alpha": torch.tensor(0.0)}):
        down, up = torch.ones(2, 8, 3, 3), torch.ones(12, 2, 1, 1)
        tensors = {"lycoris_conv.lora_down.weight": down, "lycoris_conv.lora_up.weight": up}
        save_file(tensors | alpha, tmp_path / "a.safetensors")
        adapter = convert.from_kohya(net(), tmp_path / "a.safetensors")
        assert float(adapter.layers["conv"].scale) == 1


def test_alpha_of_the_export_is_the_adapters_where_diffusers_writes_the_rank(tmp_path) -> None:
    adapter = convlora.inject_lora(net(), rank=2, alpha=4, relative=False)
    file = convert.to_kohya(adapter, tmp_path / "a.safetensors")
    assert float(load_file(file)["lycoris_conv.alpha"]) == 4
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_alpha"] == "4"


def test_rslora_is_baked_into_alpha_as_kohyas_readers_want_it(tmp_path) -> None:
    adapter = convlora.inject(net(), "lora", 4, alpha=3, rslora=True, relative=False)
    file = convert.to_kohya(adapter, tmp_path / "a.safetensors")
    assert float(load_file(file)["lycoris_conv.alpha"]) == 6  # 3·4/√4


def test_double_precision_survives_the_round_trip_bit_for_bit(tmp_path, randomize) -> None:
    adapter = convlora.inject_lora(net().double(), rank=3, alpha=0.1)
    randomize(adapter)
    back = convert.from_kohya(net().double(), convert.to_kohya(adapter, tmp_path / "a.safetensors"))
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in adapter.state_dict().items())


def test_half_precision_files_are_read(tmp_path, randomize) -> None:
    model = net()
    adapter = convlora.inject_lora(model, rank=2)
    randomize(adapter)
    file = convert.to_kohya(adapter, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    assert load_file(file)["lycoris_conv.lora_down.weight"].dtype == torch.bfloat16
    again = net()
    convert.from_kohya(again, file)
    close(outputs(again), loaded_by_lycoris(file))


def test_a_loha_of_alpha_other_than_rank_is_merged_with_the_scale_once(tmp_path) -> None:
    # LyCORIS 4.1.3's own merge_to applies alpha/rank twice.
    expected = saved_by_lycoris(tmp_path / "a.safetensors", alpha=0.5, algo="loha")
    model = net()
    convert.from_kohya(model, tmp_path / "a.safetensors").merge(keep=False)
    close(outputs(model), expected)


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(["lora", "tucker", "dora", "loha", "lokr"]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([(), (1,), (3,), (1, 1), (3, 3), (2, 3), (1, 2, 3)]),
    st.integers(1, 3),
    st.floats(0.01, 40),
)
def test_round_trip_on_any_shape(tmp_path_factory, method, out, inputs, kernel, rank, alpha) -> None:
    file = tmp_path_factory.mktemp("kohya") / "a.safetensors"

    def build() -> nn.Module:
        torch.manual_seed(0)
        conv = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][len(kernel)]
        return nn.ModuleDict({"a_b": conv(inputs, out, kernel) if kernel else conv(inputs, out)})

    rank = min(rank, out, inputs * (torch.Size(kernel).numel()))
    adapter = convlora.inject(build(), method, rank, alpha=alpha)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    convert.to_kohya(adapter, file)
    back = convert.from_kohya(build(), file)
    with torch.no_grad():
        torch.testing.assert_close(back.delta("a_b"), adapter.delta("a_b"), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- names


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Conv2d(3, 4, 3)})
        self.a_b = nn.ModuleDict({"c": nn.Conv2d(3, 4, 3)})
        self.d = nn.Conv2d(3, 4, 3)


def test_names_that_come_out_the_same_are_refused_where_lycoris_drops_one(tmp_path) -> None:
    adapter = convlora.inject_lora(Twins(), rank=1)
    with pytest.raises(convlora.ConvloraError, match="'a.b_c' and 'a_b.c' both"):
        convert.to_kohya(adapter, tmp_path / "a.safetensors")
    convert.to_kohya(convlora.inject_lora(Twins(), rank=1, targets="d"), tmp_path / "d.safetensors")
    convert.from_kohya(Twins(), tmp_path / "d.safetensors")  # the twins are not in it: no matter
    tensors = {k.replace("_d.", "_a_b_c."): v for k, v in load_file(tmp_path / "d.safetensors").items()}
    save_file(tensors, tmp_path / "twin.safetensors")
    with pytest.raises(convlora.ConvloraError, match="'a.b_c' and 'a_b.c' both"):
        convert.from_kohya(Twins(), tmp_path / "twin.safetensors")


def test_underscores_in_module_names_are_found_where_replacing_them_by_dots_loses_the_layer(tmp_path) -> None:
    saved_by_lycoris(tmp_path / "a.safetensors")
    assert "body.conv_in" in convert.from_kohya(net(), tmp_path / "a.safetensors").layers


@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet", "lora_te1"])
def test_any_prefix_is_found_and_a_given_one_selects(prefix, tmp_path) -> None:
    file = convert.to_kohya(convlora.inject_lora(net(), rank=1), tmp_path / "a.safetensors", prefix=prefix)
    assert len(convert.from_kohya(net(), file).layers) == 6
    both = load_file(file) | {"lora_other_thing.lora_down.weight": torch.ones(1, 3)}
    save_file(both, tmp_path / "both.safetensors")
    assert len(convert.from_kohya(net(), tmp_path / "both.safetensors", prefix=prefix).layers) == 6
    with pytest.raises(convlora.ConvloraError, match="lora_other_thing.*prefix="):
        convert.from_kohya(net(), tmp_path / "both.safetensors")
    with pytest.raises(convlora.ConvloraError, match="keys that begin with 'nobody_'"):
        convert.from_kohya(net(), file, prefix="nobody")
    with pytest.raises(convlora.ConvloraError, match="plain word"):
        convert.to_kohya(convlora.inject_lora(net(), rank=1), file, prefix="a.b")


# ------------------------------------------------------------------------------------------------- what is refused


def drop(word: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if word not in key}


def add(key: str, *shape: int):
    return lambda tensors: tensors | {key: torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("fc.lora_up"), "no whole set"),
        (add("lycoris_fc.oft_blocks", 2, 2), "no whole set"),
        (add("lycoris_nowhere.alpha"), "lycoris_nowhere"),
        (add("stray"), "not of the form"),
        (lambda t: {k.replace("lycoris_", "lycoris_net_"): v for k, v in t.items()} | add("x_y.alpha")({}), "x_y"),
        (lambda t: {k: v.flatten(1)[:, :1] if "conv.lora_down" in k else v for k, v in t.items()}, "shape"),
        (lambda t: {k: v * float("inf") for k, v in t.items()}, "NaN"),
        (lambda t: drop("fc")(t) | {f"lycoris_fc.hada_w{i}": torch.ones(2, 2) for i in ("1_a", "1_b", "2_a", "2_b")},
         "mixes"),
        (lambda t: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(change, match, tmp_path) -> None:
    file = convert.to_kohya(convlora.inject_lora(net(), rank=1), tmp_path / "a.safetensors")
    save_file({key: tensor.clone() for key, tensor in change(load_file(file)).items()}, file)
    model = net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(convlora.ConvloraError, match=match):
        convert.from_kohya(model, file)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "svdiff"}, "no product of two factors"),
        ({"method": "lora", "rank": 1, "train": "line.bias"}, "no place for tensors trained in full"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_with_the_reason(options, reason, tmp_path) -> None:
    with pytest.raises(convlora.ConvloraError, match=reason):
        convert.to_kohya(convlora.inject(net(), **options), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.ConvTranspose2d(3, 4, 3),
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    ],
)
def test_layers_that_lycoris_leaves_out_or_computes_otherwise_are_refused_both_ways(layer, tmp_path) -> None:
    model = nn.Sequential(layer()).eval()
    adapter = convlora.inject_lora(model, rank=1)
    with pytest.raises(convlora.ConvloraError, match="cannot be shared with LyCORIS"):
        convert.to_kohya(adapter, tmp_path / "a.safetensors")
    adapter.remove()
    file = convert.to_kohya(convlora.inject_lora(nn.Sequential(nn.Conv2d(3, 4, 3)), rank=1), tmp_path / "b.safetensors")
    with pytest.raises(convlora.ConvloraError, match="cannot be shared with LyCORIS"):
        convert.from_kohya(model, file)
    assert convlora.Adapter.names(model) == []


def test_a_dora_scale_of_another_axis_and_shape_is_told_apart(tmp_path) -> None:
    file = convert.to_kohya(convlora.inject(net(), "dora", 1, axis="in"), tmp_path / "a.safetensors")
    tensors = load_file(file)
    assert tensors["lycoris_conv.dora_scale"].shape == (1, 8, 1, 1)
    assert tensors["lycoris_fc.dora_scale"].shape == (1, 6)
    assert convert.from_kohya(net(), file).options["axis"] == "in"
    tensors["lycoris_conv.dora_scale"] = torch.ones(12, 1, 1, 1)
    save_file(tensors, file)
    with pytest.raises(convlora.ConvloraError, match="per output on some"):
        convert.from_kohya(net(), file)
    tensors["lycoris_conv.dora_scale"] = torch.ones(5, 1, 1, 1)
    save_file(tensors, file)
    with pytest.raises(convlora.ConvloraError, match="on a weight of shape"):
        convert.from_kohya(net(), file)
