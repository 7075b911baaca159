"""Adapters to and from PEFT, compared with the real library's own outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
from convlora import convert

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Net(nn.Module):
    """A linear layer, convolutions of one to three dimensions, and two names of which one is the end of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4 * 4 * 4)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.ModuleDict({"conv": nn.Conv2d(8, 6, 3, stride=2, padding=1), "point": nn.Conv2d(6, 6, 1)})
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.cube = nn.Conv3d(1, 3, (1, 2, 3), padding=(0, 1, 1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.fc(z).view(-1, 4, 4, 4)))
        x = self.body["point"](self.body["conv"](x.relu()))
        return self.cube(self.line(x.flatten(2)).unsqueeze(1).unsqueeze(1))


LAYERS = ["fc", "conv", "body.conv", "body.point", "line", "cube"]


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    model = Net().to(dtype).eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def z(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(5), dtype=dtype)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(z(next(model.parameters()).dtype))


def peft_model(**config) -> peft.PeftModel:
    """PEFT's own adapter on `net()`, with random values."""
    model = peft.get_peft_model(net(), peft.LoraConfig(**{"r": 2, "target_modules": LAYERS, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3 + (0.1 if "magnitude" in name else 0))
    return model


def saved_by_peft(folder: Path, **config) -> torch.Tensor:
    model = peft_model(**config)
    model.save_pretrained(folder)
    return outputs(model)


def loaded_by_peft(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys it misses
        warnings.filterwarnings("ignore", ".*groups > 1.*")
        return outputs(peft.PeftModel.from_pretrained(net(dtype), str(folder), autocast_adapter_dtype=False).eval())


def close(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None = None) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert (a - outputs(net())).abs().max() > 2e-3  # and the adapter does something


CONFIGS = {
    "lora": {},
    "alpha": {"lora_alpha": 7},
    "rslora": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "dora": {"use_dora": True, "lora_alpha": 5},
    "patterns": {
        "r": 3,
        "lora_alpha": 4,
        "rank_pattern": {"^conv": 1, "body.conv": 2},
        "alpha_pattern": {"point": 9, "fc|line": 0.5},
    },
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["norm"], "target_modules": ["fc", "body.conv"]},
    "lora_bias": {"lora_bias": True},
    "regex": {"target_modules": r".*conv"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapter_from_peft_computes_what_peft_computes(config, tmp_path) -> None:
    expected = saved_by_peft(tmp_path, **config)
    model = net()
    adapter = convert.from_peft(model, tmp_path)
    assert adapter.method == ("dora" if config.get("use_dora") else "lora")
    close(outputs(model), expected)
    adapter.merge()
    close(outputs(model), expected)


# a lora_bias comes back as a trained bias
@pytest.mark.parametrize("config", [pytest.param(CONFIGS[name], id=name) for name in CONFIGS if name != "lora_bias"])
def test_from_peft_and_back_keeps_every_tensor_bit_for_bit_and_loads_in_peft(config, tmp_path) -> None:
    expected = saved_by_peft(tmp_path / "in", **config)
    adapter = convert.from_peft(net(), tmp_path / "in")
    convert.to_peft(adapter, tmp_path / "out")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("in", "out"))
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    close(loaded_by_peft(tmp_path / "out"), expected)
    again = convert.from_peft(net(), tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in adapter.state_dict().items())


OURS = {
    "lora": {"rank": 2, "alpha": 3.0},
    "lora per layer": {"rank": 2, "alpha": {"conv": 5, "*": 0.7}, "ranks": {"fc": 3, "line": 1, "*": 2}},
    "relative off": {"rank": 2, "relative": False, "alpha": 0.3},
    "rslora": {"rank": 3, "rslora": True, "alpha": 8},
    "kernel ranks": {"rank": 1, "rank_per": "kernel"},
    "pissa": {"rank": 1, "init": "pissa"},
    "dora": {"method": "dora", "rank": 2, "alpha": 3.0},
    "tucker": {"method": "tucker", "rank": 2},
    "para": {"method": "para", "rank": 2, "exclude": ["cube", "line"]},
    "lidb": {"method": "lidb", "rank": 1},
    "some layers": {"rank": 1, "targets": ["conv", "fc"]},
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS)
def test_an_adapter_written_for_peft_computes_the_same_there(options, tmp_path, randomize) -> None:
    options = dict(options)
    model = net()
    adapter = convlora.inject(model, options.pop("method", "lora"), **options)
    randomize(adapter)
    convert.to_peft(adapter, tmp_path)
    close(loaded_by_peft(tmp_path), outputs(model))
    again = net()
    convert.from_peft(again, tmp_path)
    close(outputs(again), outputs(model))


def test_scale_and_factors_survive_the_round_trip_bit_for_bit(tmp_path, randomize) -> None:
    adapter = convlora.inject_lora(net(), rank=3, alpha=0.1)  # relative: every layer has a scale of its own
    randomize(adapter)
    convert.to_peft(adapter, tmp_path)
    again = convert.from_peft(net(), tmp_path)
    own, back = adapter.state_dict(), again.state_dict()
    assert all(torch.equal(own[key], back[key]) for key in own)


def test_strength_goes_into_alpha_exactly_and_into_trained_tensors(tmp_path, randomize) -> None:
    model = net()
    adapter = convlora.inject_lora(model, rank=2, targets=["fc", "conv", "body.conv"], train="norm")
    randomize(adapter)
    adapter.set_strength({"fc": 0.0, "conv": -1.5, "norm*": 0.25})
    convert.to_peft(adapter, tmp_path)
    close(loaded_by_peft(tmp_path), outputs(model))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["norm"]


def test_modules_to_save_take_their_running_statistics_along(tmp_path, randomize) -> None:
    model = net()
    adapter = convlora.inject_lora(model, rank=1, targets="conv", train="norm")
    randomize(adapter)
    model.norm.train()
    model(z())
    model.eval()
    convert.to_peft(adapter, tmp_path)
    close(loaded_by_peft(tmp_path), outputs(model))
    again = net()
    back = convert.from_peft(again, tmp_path)
    assert torch.equal(again.norm.running_var, model.norm.running_var)
    back.remove()
    assert torch.equal(again.norm.running_var, net().norm.running_var)


def test_half_precision_files_are_read_and_written(tmp_path, randomize) -> None:
    model = net()
    adapter = convlora.inject_lora(model, rank=2)
    randomize(adapter)
    convert.to_peft(adapter, tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float16}
    again = net()
    convert.from_peft(again, tmp_path)
    assert (outputs(again) - outputs(model)).abs().max() < 2e-2
    close(outputs(again), loaded_by_peft(tmp_path))


def test_double_precision_survives_the_round_trip_bit_for_bit(tmp_path, randomize) -> None:
    model = net(torch.float64)
    adapter = convlora.inject_lora(model, rank=3, alpha=0.1)
    randomize(adapter)
    convert.to_peft(adapter, tmp_path)
    again = net(torch.float64)
    back = convert.from_peft(again, tmp_path)
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in adapter.state_dict().items())
    torch.testing.assert_close(loaded_by_peft(tmp_path, torch.float64), outputs(model), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.floats(0.01, 40)
)
def test_round_trip_on_any_grouped_convolution(tmp_path_factory, groups, a, b, k, rank, alpha) -> None:
    folder = tmp_path_factory.mktemp("peft")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(a * groups, 2 * b * groups, k, padding=1, groups=groups))

    model = build()
    rank = min(rank, 2 * b * groups, a * k * k)
    adapter = convlora.inject_lora(model, rank=rank, alpha=alpha)
    with torch.no_grad():
        adapter.layers["0"].B.normal_()
    convert.to_peft(adapter, folder)
    x = torch.randn(2, a * groups, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(), str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4 * float(model(x).abs().max()))
    back = convert.from_peft(build(), folder)
    own = adapter.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in back.state_dict().items() if key != "0/scale")
    assert float(back.layers["0"].scale) == pytest.approx(float(adapter.layers["0"].scale), rel=1e-7)


def test_a_grouped_lora_of_peft_that_mixes_groups_is_refused_and_one_that_does_not_is_read(tmp_path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval()

    with pytest.warns(UserWarning, match="groups"):
        theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["0"], lora_alpha=3)).eval()
    with torch.no_grad():
        theirs.base_model.model[0].lora_B["default"].weight.normal_()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(convlora.ConvloraError, match="reads the inputs of all groups"):
        convert.from_peft(build(), tmp_path)
    with torch.no_grad():  # rows 0, 1 belong to group 0, which has inputs 0, 1
        A = theirs.base_model.model[0].lora_A["default"].weight
        A[:2, 2:], A[2:, :2] = 0, 0
    theirs.save_pretrained(tmp_path)
    ours = build()
    adapter = convert.from_peft(ours, tmp_path)
    assert adapter.layers["0"].A.shape[0] == 4
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


class Affine(nn.Module):
    """A fully connected layer in the manner of StyleGAN2's, which is no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return x @ (self.weight * 0.5).T


def test_a_raw_matrix_that_peft_adapted_as_a_parameter_is_read(tmp_path) -> None:
    base = nn.ModuleDict({"affine": Affine()})
    base.forward = lambda x: base["affine"](x)  # type: ignore[method-assign]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_parameters=["affine.weight"]))
    weight = base["affine"].base_layer.weight.detach().clone()
    with torch.no_grad():
        base["affine"].lora_B["default"].weight.normal_()
    expected = theirs.base_model.model["affine"].get_delta_weight("default").detach()
    theirs.save_pretrained(tmp_path)
    ours = nn.ModuleDict({"affine": Affine()})
    ours["affine"].weight.data = weight
    adapter = convert.from_peft(ours, tmp_path)
    torch.testing.assert_close(adapter.delta("affine"), expected)
    assert expected.norm() > 0.1


# ------------------------------------------------------------------------------------------------- what is refused


def untouched(model: nn.Module, call) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    call()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert convlora.Adapter.names(model) == []


def refuse(folder: Path, match: str, model: nn.Module | None = None) -> None:
    def call() -> None:
        with pytest.raises(convlora.ConvloraError, match=match):
            convert.from_peft(model, folder)

    model = net() if model is None else model
    untouched(model, call)


def edit(folder: Path, tensors=None, **config) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        file = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(file)), file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "never unpickles"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x80\x02cfoo"), "adapter_model.safetensors"),
        (lambda f: edit(f, r=3), "where its config and"),
        (lambda f: edit(f, r="2"), "no number"),
        (lambda f: edit(f, rank_pattern={"(": 3}), "no regular expression"),
        (lambda f: edit(f, target_modules="("), "no regular expression"),
        (lambda f: edit(f, peft_type="OFT"), "PEFT's OFT"),
        (lambda f: edit(f, use_dora=True), "no magnitude"),
        (lambda f: edit(f, init_lora_weights="pissa"), "takes the start off"),
        (lambda f: edit(f, use_qalora=True), "use_qalora"),
        (lambda f: edit(f, a_future_field={"x": 1}), "a_future_field"),
        (lambda f: edit(f, target_modules=[*LAYERS, "norm", "point", "conv"], tensors=lambda t: {
            k: v for k, v in t.items() if "point" not in k}), "no tensors for .'body.point'"),
        (lambda f: edit(f, lambda t: {k.replace("base_model.model.", ""): v for k, v in t.items()}), "from_diffusers"),
        (lambda f: edit(f, lambda t: {k.replace(".model.", ".model.net."): v for k, v in t.items()}), "'net."),
        (lambda f: edit(f, lambda t: {k: v for k, v in t.items() if "fc.lora_A" not in k}), "other half"),
        (lambda f: edit(f, lambda t: {k.replace("fc.lora_A.", "fc.lora_A.default."): v for k, v in t.items()}),
         "none of the tensors"),
        (lambda f: edit(f, lambda t: {k: v * float("nan") for k, v in t.items()}), "NaN"),
        (lambda f: edit(f, lambda t: {}), "no tensor of a LoRA"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(change, match, tmp_path) -> None:
    saved_by_peft(tmp_path)
    change(tmp_path)
    refuse(tmp_path, match)


def test_a_wrong_prefix_is_an_error_where_peft_loads_a_zero_adapter_with_one_warning(tmp_path) -> None:
    saved_by_peft(tmp_path, target_modules=["fc", "conv"])
    edit(tmp_path, lambda t: {k.replace("base_model.model.", "base_model.model.generator."): v for k, v in t.items()})
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    assert torch.equal(outputs(theirs), outputs(net()))  # theirs: silently nothing
    refuse(tmp_path, "generator")


class Odd(nn.Conv2d):
    """A convolution that scales its weight, as equalised-learning-rate networks do."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 0.5, self.bias)


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.ConvTranspose2d(3, 4, 3), "none of the layers they adapt"),
        (lambda: nn.Conv2d(3, 4, 3, dilation=2), "drop dilation"),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "drop padding_mode='reflect'"),
        (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), "drop padding_mode='circular'"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "normalised"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), "normalised"),
        (lambda: Odd(3, 4, 3), "subclass"),
        (Raw, "none of the layers they adapt"),
    ],
)  # fmt: skip
def test_layers_on_which_peft_computes_another_function_are_refused_both_ways(layer, reason, tmp_path) -> None:
    model = nn.Sequential(layer()).eval()
    adapter = convlora.inject_lora(model, rank=1)
    with pytest.raises(convlora.ConvloraError, match=reason):
        convert.to_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plain = convlora.inject_lora(nn.Sequential(nn.Conv2d(3, 4, 3)), rank=1)
    convert.to_peft(plain, tmp_path / "plain")
    adapter.remove()
    refuse(tmp_path / "plain", reason, model)


def test_dilation_without_effect_is_no_reason_to_refuse(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, dilation=2), nn.Conv2d(4, 4, 3, padding_mode="reflect"))
    convert.to_peft(convlora.inject_lora(model, rank=1), tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "loha"}, "no product of two factors"),
        ({"method": "svdiff"}, "no product of two factors"),
        ({"method": "full"}, "no product of two factors"),
        ({"method": "dora", "axis": "in"}, "per input"),
        ({"method": "lora", "train": "norm.bias"}, "in part"),
        ({"method": "lora", "targets": "body.conv", "train": "conv"}, "would also take"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused_with_the_reason(options, reason, tmp_path) -> None:
    adapter = convlora.inject(net(), **options)
    with pytest.raises(convlora.ConvloraError, match=reason):
        convert.to_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dora_at_another_strength_is_refused_and_a_grouped_one_too(tmp_path) -> None:
    adapter = convlora.inject(net(), "dora", 1)
    adapter.set_strength(0.5)
    with pytest.raises(convlora.ConvloraError, match="strength 0.5"):
        convert.to_peft(adapter, tmp_path)
    grouped = convlora.inject(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "dora", 1)
    with pytest.raises(convlora.ConvloraError, match="wrong on grouped"):
        convert.to_peft(grouped, tmp_path)


def test_a_taken_name_is_refused_and_another_one_stacks(tmp_path) -> None:
    saved_by_peft(tmp_path)
    model = net()
    first = convert.from_peft(model, tmp_path)
    with pytest.raises(convlora.ConvloraError, match="already has an adapter"):
        convert.from_peft(model, tmp_path)
    convert.from_peft(model, tmp_path, name="second")
    assert convlora.Adapter.names(model) == ["default", "second"]
    first.remove()


def test_an_imported_adapter_is_saved_and_loaded_as_any_other(tmp_path) -> None:
    saved_by_peft(tmp_path, **CONFIGS["patterns"])
    model, again = net(), net()
    adapter = convert.from_peft(model, tmp_path)
    adapter.save(tmp_path / "me.safetensors")
    convlora.load_adapter(again, tmp_path / "me.safetensors")
    assert torch.equal(outputs(model), outputs(again))
