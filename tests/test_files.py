"""Adapter files: exact round trips, atomic writes, and loads that succeed fully or change nothing."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

import convlora
from convlora import files
from convlora.errors import FileError
from convlora.integrations import eg3d
from convlora.integrations.eg3d.personalize import TARGETS


def make() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.BatchNorm2d(4)).eval()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path, randomize):
    net = make()
    adapter = convlora.inject_lora(net, rank=2, alpha={"0": 3.0}, ranks={"2": 1}, train=["3"])
    randomize(adapter)
    return net(X), adapter.save(tmp_path / "me.safetensors", person="lab person A", base_model="toy")


def test_a_file_reproduces_the_model_bit_for_bit(saved):
    y, path = saved
    net = make()
    adapter = convlora.load_adapter(net, path)
    assert torch.equal(net(X), y)
    assert adapter.options["alpha"] == {"0": 3.0, "2": None} and adapter.method == "lora"
    assert {p.requires_grad for p in adapter.parameters()} == {True}


def test_the_file_is_safetensors_with_documented_names(saved):
    _, path = saved
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert keys == {"0/A", "0/B", "0/scale", "2/A", "2/B", "2/scale", "train/3.weight", "train/3.bias",
                    "train/3.running_mean", "train/3.running_var", "train/3.num_batches_tracked"}  # fmt: skip
    assert metadata["format"] == "convlora" and metadata["format_version"] == "1" and metadata["method"] == "lora"
    assert json.loads(metadata["ranks"]) == {"*": [2, 2, 1], "2": [1, 1]}
    assert metadata["person"] == "lab person A" and metadata["library_version"] == convlora.__version__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_precisions(saved, tmp_path, dtype):
    y, path = saved
    net = make()
    small = convlora.load_adapter(net, path).save(tmp_path / "small.safetensors", dtype=dtype)
    assert small.stat().st_size < path.stat().st_size
    fresh = make()
    adapter = convlora.load_adapter(fresh, small)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(fresh(X), y, rtol=0.05, atol=0.05)
    with pytest.raises(convlora.ConvloraError, match="dtype must be"):
        adapter.save(tmp_path / "int.safetensors", dtype=torch.int8)


def test_an_adapter_of_another_base_is_refused_unless_asked(saved):
    y, path = saved
    other = make()
    with torch.no_grad():
        other[0].weight.add_(0.1)
    with pytest.raises(FileError, match="trained on 'toy'.*same architecture with other weights"):
        convlora.load_adapter(other, path)
    assert convlora.Adapter.names(other) == []
    convlora.load_adapter(other, path, check_base=False)
    assert not torch.equal(other(X), y)
    with pytest.raises(FileError, match="another architecture"):
        convlora.load_adapter(nn.Sequential(nn.Conv2d(3, 9, 3)), path)


def test_the_name_must_be_free(saved):
    _, path = saved
    net = make()
    convlora.load_adapter(net, path)
    with pytest.raises(convlora.ConvloraError, match="already has an adapter named 'default'"):
        convlora.load_adapter(net, path)
    convlora.load_adapter(net, path, name="again")
    assert convlora.Adapter.names(net) == ["default", "again"]


def test_an_interrupted_write_leaves_the_old_file(saved, monkeypatch):
    y, path = saved
    content = path.read_bytes()
    net = make()
    adapter = convlora.load_adapter(net, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        adapter.save(path)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file stays behind"


def test_load_state_dict_is_all_or_nothing(saved):
    y, path = saved
    net = make()
    adapter = convlora.load_adapter(net, path)
    state = adapter.state_dict()
    with pytest.raises(FileError, match="missing tensors"):
        adapter.load_state_dict({k: v + 1 for k, v in state.items() if k != "2/B"})
    assert torch.equal(net(X), y)


def test_metadata_of_convlora_cannot_be_overwritten(saved, tmp_path):
    adapter = convlora.inject_lora(make())
    with pytest.raises(FileError, match="'method'"):
        adapter.save(tmp_path / "x.safetensors", method="mine")
    with pytest.raises(FileError, match="is a folder"):
        adapter.save(tmp_path)


def test_ranks_are_told_once_and_files_that_name_every_layer_are_read(tmp_path):
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(12)))
    adapter = convlora.inject_lora(model, targets=[str(i) for i in range(11)], ranks={"3": 2}, train=["11"])
    path = adapter.save(tmp_path / "a.safetensors")
    tensors, metadata = files.read(path)
    assert json.loads(metadata["ranks"]) == {"*": [1, 1, 10], "3": [2, 2]}
    named = adapter.record.ranks
    assert list(named) == [str(i) for i in range(11)]
    old = files.write(tmp_path / "old.safetensors", tensors, metadata | {"ranks": json.dumps(named)})
    for file in (path, old):
        found = files.record_of(file, files.read(file)[1], tensors)
        assert found.ranks == named and list(found.ranks) == list(named)
        twin = nn.Sequential(*(nn.Linear(5, 5) for _ in range(12)))
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if "convlora" not in k})
        assert convlora.load_adapter(twin, file).record.ranks == named


def test_a_lidb_adapter_of_the_full_size_eg3d_is_below_32_kb(tmp_path):
    """7,688 numbers in float16 and what tells whose they are."""
    G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"])
    adapter = convlora.inject(G, "lidb", targets=list(TARGETS))
    assert adapter.num_parameters == 7688
    path = adapter.save(tmp_path / "ada.safetensors", torch.float16, person="Ada Lovelace", consent="given, 2026-11-29")
    assert path.stat().st_size <= 32_000
