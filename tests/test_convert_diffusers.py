"""diffusers' files, and telling formats apart. The real diffusers takes part where it is installed."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import convlora
from convlora import convert


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.attn = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x).flatten(2).transpose(1, 2)
        return self.attn.to_out[0](self.attn.to_q(x).relu())


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("component", [None, "unet"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_round_trip_keeps_tensors_and_scales_bit_for_bit(component, method, tmp_path, randomize) -> None:
    model = net()
    adapter = convlora.inject(model, method, 2, alpha=0.3, ranks={"conv_in": 3, "*": 2})
    randomize(adapter)
    file = convert.to_diffusers(adapter, tmp_path / "pytorch_lora_weights.safetensors", component=component)
    again = net()
    back = convert.from_diffusers(again, tmp_path)
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in adapter.state_dict().items())
    torch.testing.assert_close(outputs(again), outputs(model))
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert config[f"{component}.use_dora" if component else "use_dora"] is (method == "dora")


def pairs(ranks: dict[str, int], down: str = ".lora_A.weight", up: str = ".lora_B.weight") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = {"conv_in": ((3, 3, 3), (4, 1, 1)), "attn.to_q": ((4,), (4,)), "attn.to_out.0": ((4,), (4,))}
    tensors = {}
    for layer, r in ranks.items():
        (cols, rows) = shapes[layer]
        tensors[layer + down] = torch.randn((r, *cols), generator=g)
        tensors[layer + up] = torch.randn((rows[0], r, *rows[1:]), generator=g)
    return tensors


RANKS = {"conv_in": 2, "attn.to_q": 1, "attn.to_out.0": 3}


def expected(tensors, layer: str, scale: float) -> torch.Tensor:
    A, B = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
    return scale * (B.flatten(1) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])


def test_a_file_that_says_nothing_of_alpha_has_scale_one_and_alpha_keys_count(tmp_path) -> None:
    tensors = pairs(RANKS)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = convert.from_diffusers(net(), tmp_path / "a.safetensors")
    for layer in RANKS:
        torch.testing.assert_close(adapter.delta(layer), expected(tensors, layer, 1))
    save_file(tensors | {"attn.to_out.0.alpha": torch.tensor(1.5)}, tmp_path / "b.safetensors")
    adapter = convert.from_diffusers(net(), tmp_path / "b.safetensors")
    torch.testing.assert_close(adapter.delta("attn.to_out.0"), expected(tensors, "attn.to_out.0", 0.5))
    torch.testing.assert_close(adapter.delta("conv_in"), expected(tensors, "conv_in", 1))


def test_older_names_are_read(tmp_path) -> None:
    new = pairs(RANKS)
    save_file(pairs(RANKS, ".lora.down.weight", ".lora.up.weight"), tmp_path / "a.safetensors")
    old = {key: new[key] for key in new if "conv_in" in key}
    names = {"attn.to_q": "attn.processor.to_q_lora", "attn.to_out.0": "attn.processor.to_out_lora"}
    for layer, name in names.items():
        old |= {f"unet.{name}.down.weight": new[f"{layer}.lora_A.weight"]}
        old |= {f"unet.{name}.up.weight": new[f"{layer}.lora_B.weight"]}
    old = {key if key.startswith("unet.") else f"unet.{key}": tensor for key, tensor in old.items()}
    save_file(old, tmp_path / "b.safetensors")
    for file in ("a", "b"):
        adapter = convert.from_diffusers(net(), tmp_path / f"{file}.safetensors")
        for layer in RANKS:
            torch.testing.assert_close(adapter.delta(layer), expected(new, layer, 1))


def test_a_pipelines_file_gives_the_component_that_is_asked_for(tmp_path) -> None:
    tensors = pairs(RANKS)
    both = {f"unet.{key}": tensor for key, tensor in tensors.items()}
    both |= {"text_encoder.layer.lora_A.weight": torch.ones(1, 4), "text_encoder.layer.lora_B.weight": torch.ones(4, 1)}
    save_file(both, tmp_path / "a.safetensors")
    adapter = convert.from_diffusers(net(), tmp_path / "a.safetensors", component="unet")
    torch.testing.assert_close(adapter.delta("conv_in"), expected(tensors, "conv_in", 1))
    for component, match in [(None, "text_encoder.layer|unet"), ("transformer", "begins with 'transformer.'")]:
        model = net()
        with pytest.raises(convlora.ConvloraError, match=match):
            convert.from_diffusers(model, tmp_path / "a.safetensors", component=component)
        assert convlora.Adapter.names(model) == []


def test_a_damaged_config_is_refused(tmp_path) -> None:
    save_file(pairs(RANKS), tmp_path / "a.safetensors", {"lora_adapter_metadata": "[1"})
    with pytest.raises(convlora.ConvloraError, match="no JSON object"):
        convert.from_diffusers(net(), tmp_path / "a.safetensors")


def real_net() -> tuple[nn.Module, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("peft")
        pytest.importorskip("diffusers")
        from diffusers.configuration_utils import ConfigMixin, register_to_config
        from diffusers.loaders.peft import PeftAdapterMixin
        from diffusers.models.modeling_utils import ModelMixin

    class Real(ModelMixin, ConfigMixin, PeftAdapterMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
            self.attn = Attention()

        forward = Net.forward

    torch.manual_seed(1)
    return Real().eval(), Real


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_real_diffusers_loads_our_file_and_computes_the_same(method, tmp_path, randomize) -> None:
    theirs, _ = real_net()
    model = net()
    adapter = convlora.inject(model, method, 2, alpha=0.3, ranks={"conv_in": 3, "*": 2})
    randomize(adapter)
    convert.to_diffusers(adapter, tmp_path / "pytorch_lora_weights.safetensors")
    file = "pytorch_lora_weights.safetensors"
    theirs.load_lora_adapter(str(tmp_path), prefix=None, weight_name=file, local_files_only=True)
    torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-5, atol=1e-5)
    assert (outputs(theirs) - outputs(net())).abs().max() > 1e-2
    theirs.save_lora_adapter(tmp_path / "again", adapter_name="default_0")
    again = net()
    convert.from_diffusers(again, tmp_path / "again")
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- sniff


def test_sniff_tells_every_format(tmp_path) -> None:
    adapter = convlora.inject_lora(net(), rank=1)
    adapter.save(tmp_path / "own.safetensors")
    convert.to_peft(adapter, tmp_path / "peft")
    convert.to_kohya(adapter, tmp_path / "kohya.safetensors")
    convert.to_diffusers(adapter, tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    save_file(pairs(RANKS, ".lora.down.weight", ".lora.up.weight"), tmp_path / "old.safetensors")
    save_file(load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"), tmp_path / "bare.safetensors")
    save_file({"fc.lora_A": torch.ones(1, 2), "fc.lora_B": torch.ones(2, 1)}, tmp_path / "loralib.safetensors")
    found = {
        "own.safetensors": "convlora", "peft": "peft", "peft/adapter_model.safetensors": "peft",
        "kohya.safetensors": "kohya", "diffusers": "diffusers", "old.safetensors": "diffusers",
        "diffusers/pytorch_lora_weights.safetensors": "diffusers", "bare.safetensors": "diffusers",
        "loralib.safetensors": "loralib",
    }  # fmt: skip
    assert {path: convert.sniff(tmp_path / path) for path in found} == found


def test_sniff_refuses_what_is_no_adapter(tmp_path) -> None:
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "empty").mkdir()
    for name in ("model.safetensors", "broken.safetensors", "empty", "missing.safetensors"):
        with pytest.raises(convlora.ConvloraError, match=name):
            convert.sniff(tmp_path / name)
