"""Wrong files: each has its own error, and the model is afterwards what it was, bit for bit."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import convlora
from convlora import files
from convlora.errors import FileError

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def make() -> nn.Sequential:
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)
    )
    net[4].requires_grad_(False)
    return net.eval()


@pytest.fixture
def saved(tmp_path, randomize) -> Path:
    adapter = convlora.inject_lora(make(), rank=2, ranks={"2": 1}, targets=["0", "2"], train=["3"])
    randomize(adapter)
    return adapter.save(tmp_path / "me.safetensors", base_model="toy")


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def rewritten(path: Path, tensors: dict[str, Tensor | None] | None = None, **metadata: object) -> Path:
    """The file with some tensors and metadata fields replaced; None removes one."""
    old, fields = contents(path)
    new = {key: value for key, value in {**old, **(tensors or {})}.items() if value is not None}
    texts = {
        key: v if isinstance(v, str) else json.dumps(v) for key, v in {**fields, **metadata}.items() if v is not None
    }
    save_file(new, target := path.with_name("spoiled.safetensors"), texts)
    return target  # fmt: skip


def with_options(path: Path, /, **options: object) -> Path:
    known = json.loads(contents(path)[1]["options"])
    return rewritten(path, options={k: v for k, v in {**known, **options}.items() if v != "remove"})


def with_bytes(path: Path, content: bytes) -> Path:
    (target := path.with_name("spoiled.safetensors")).write_bytes(content)
    return target


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(path: Path, change) -> Path:
    header, data = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    return with_bytes(path, len(text).to_bytes(8, "little") + text + data)


def as_type(path: Path, name: str, size: int) -> Path:
    """The tensor 0/B under a dtype of this name in the file; `size` bytes a value."""
    header, data = header_of(path)
    begin, end = header["0/B"]["data_offsets"]
    values = data[begin:end].ljust(16 * size, b"\0")[: 16 * size]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [o + 16 * size - (end - begin) for o in entry["data_offsets"]]
    header["0/B"] = {"dtype": name, "shape": [8, 2], "data_offsets": [begin, begin + 16 * size]}
    text = json.dumps(header).encode()
    return with_bytes(path, len(text).to_bytes(8, "little") + text + data[:begin] + values + data[end:])


def with_value(path: Path, key: str, value: float) -> Path:
    tensor = contents(path)[0][key].clone()
    tensor.view(-1)[-1] = value
    return rewritten(path, {key: tensor})


class Booby:
    """Unpickling it leaves a trace."""

    trace = Path("/nonexistent")

    def __reduce__(self):
        return Path.touch, (self.trace,)


def zipped_pickle(path: Path) -> Path:
    Booby.trace, file = path.with_name("exploded"), io.BytesIO()
    torch.save({"a": Booby()}, file)
    return with_bytes(path, file.getvalue())


def raw_pickle(path: Path, protocol: int = 2) -> Path:
    Booby.trace = path.with_name("exploded")
    return with_bytes(path, pickle.dumps({"a": Booby()}, protocol))


def legacy_torch_file(path: Path) -> Path:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    return with_bytes(path, file.getvalue())


RANKS = {"0": [2, 2], "2": [1, 1]}
B0 = torch.zeros(8, 2)
CASES = {
    # not the file it should be
    "missing": (lambda p: p.with_name("nowhere.safetensors"), "no such file"),
    "folder": (lambda p: p.parent, r"is a folder; give a file, such as .*me\.safetensors"),
    "empty": (lambda p: with_bytes(p, b""), "is empty"),
    "a few bytes": (lambda p: with_bytes(p, b"abc"), "cannot be read as safetensors"),
    "text": (lambda p: with_bytes(p, b"a" * 500), "cannot be read as safetensors"),
    "pickle in a zip": (zipped_pickle, "is a pickle in a zip archive.*never unpickles"),
    "raw pickle": (raw_pickle, "is a pickle: .*never unpickles"),
    "raw pickle, protocol 5": (lambda p: raw_pickle(p, 5), "is a pickle: .*never unpickles"),
    "old torch file": (legacy_torch_file, "is a pickle: .*never unpickles"),
    "git lfs pointer": (
        lambda p: with_bytes(p, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
    "web page": (lambda p: with_bytes(p, b"\n<!doctype html><title>Sign in</title>"), "is a web page"),
    "safetensors without an adapter": (lambda p: with_bytes(p, save_plain(p)), "is no convlora adapter"),
    # damaged as a container
    "truncated data": (lambda p: with_bytes(p, p.read_bytes()[:-100]), "cannot be read as safetensors.*truncated"),
    "truncated header": (lambda p: with_bytes(p, p.read_bytes()[:200]), r"announces a header of .* but 192 follow"),
    "huge header": (
        lambda p: with_bytes(p, (1 << 40).to_bytes(8, "little") + p.read_bytes()[8:]), "a header of 1,099,511,627,776"),
    "header that is no JSON": (
        lambda p: with_bytes(p, p.read_bytes().replace(b'"0/A"', b'"0/A,')), "cannot be read as safetensors"),
    "offsets outside the data": (
        lambda p: with_header(p, lambda h: h["0/A"]["data_offsets"].__setitem__(1, 10**9)), "cannot be read"),
    "bytes after the end": (lambda p: with_bytes(p, p.read_bytes() + b"\0" * 8), "cannot be read as safetensors"),
    # metadata
    "newer format": (lambda p: rewritten(p, format_version="99"), "format version '99'.*pip install --upgrade"),
    "no format version": (lambda p: rewritten(p, format_version=None), "format version None"),
    "format of another library": (lambda p: rewritten(p, format="pt"), "is no convlora adapter.*'pt'"),
    "field missing": (lambda p: rewritten(p, options=None), "damaged adapter metadata .*KeyError: 'options'"),
    "JSON cut off": (lambda p: rewritten(p, ranks="[1"), "damaged adapter metadata"),
    "ranks a list": (lambda p: rewritten(p, ranks=[1]), "ranks must be a JSON object, not"),
    "rank not whole": (lambda p: rewritten(p, ranks={**RANKS, "0": [1.5, 2]}), "two whole numbers above 0"),
    "rank 0": (lambda p: rewritten(p, ranks={**RANKS, "0": [0, 0]}), "two whole numbers above 0"),
    "rank negative": (lambda p: rewritten(p, ranks={**RANKS, "0": [-1, 2]}), "two whole numbers above 0"),
    "rank that would fill the memory": (lambda p: rewritten(p, ranks={**RANKS, "0": [1, 10**15]}), "is above 27"),
    "rank beyond the file's": (lambda p: rewritten(p, ranks={**RANKS, "0": [3, 3]}), "'0/A' has shape"),
    "names that are no list": (lambda p: rewritten(p, trained={"3.weight": 1}), "trained must be a JSON list"),
    "a name twice": (lambda p: rewritten(p, trained=["3.weight"] * 2), "list of different names"),
    "a name that is a number": (lambda p: rewritten(p, buffers=[3]), "list of different names"),
    "strength of no layer": (lambda p: rewritten(p, strengths={"9": 1.0}), "strengths for .'9'."),
    "strength NaN": (lambda p: rewritten(p, strengths={"0": float("nan")}), "NaN is not a number"),
    "strength a word": (lambda p: rewritten(p, strengths={"0": "much"}), "damaged adapter metadata"),
    "unknown method": (lambda p: rewritten(p, method="magic"), "unknown method 'magic'"),
    "options a list": (lambda p: rewritten(p, options=[]), "options must be a JSON object"),
    "options without a path": (lambda p: with_options(p, path="remove"), "options lack a path"),
    "unknown option": (lambda p: with_options(p, zap=1), "does not fit.*no option 'zap'"),
    "path of another kind": (lambda p: with_options(p, path=3), 'path must be "auto"'),
    "alpha a word": (lambda p: with_options(p, alpha="big"), "does not fit this Sequential"),
    "alpha of a layer a list": (lambda p: with_options(p, alpha={"0": [1]}), "does not fit this Sequential"),
    "alpha infinite": (lambda p: with_options(p, alpha=float("inf")), "Infinity is not a number"),
    "switch a word": (lambda p: with_options(p, relative="no"), "option relative must be bool, not 'no'"),
    "number a switch": (lambda p: with_options(p, dropout=True), "option dropout must be float, not True"),
    "word a number": (lambda p: with_options(p, init=1), "option init must be str, not 1"),
    "number out of range": (lambda p: with_options(p, dropout=7.0), "0 ≤ p < 1, not 7.0"),
    # layers and tensors
    "missing tensor": (lambda p: rewritten(p, {"0/A": None}), r"missing tensors \['0/A'\]"),
    "missing layer": (
        lambda p: rewritten(p, {"0/A": None, "0/B": None, "0/scale": None}),
        "of 1 layers of common rank there are tensors of 0: none"),
    "extra tensor": (lambda p: rewritten(p, {"0/C": B0}), r"unexpected tensors \['0/C'\]"),
    "extra layer": (lambda p: rewritten(p, {"4/A": B0, "4/B": B0 + 0}), "of 1 layers .* tensors of 2: 0, 4"),
    "another prefix": (
        lambda p: rewritten(p, {"0/B": None, "net.0/B": B0}),
        "of 1 layers .* tensors of 2: 0, net.0"),
    "layers named, one of them missing": (
        lambda p: rewritten(p, {"0/A": None, "0/B": None, "0/scale": None}, ranks=RANKS), "missing tensors"),
    "layers named, and another one": (
        lambda p: rewritten(p, {"4/A": B0, "4/B": B0 + 0}, ranks=RANKS), r"unexpected tensors \['4/A', '4/B'\]"),
    "layers named, another prefix": (
        lambda p: rewritten(p, {"0/B": None, "net.0/B": B0}, ranks=RANKS),
        r"missing tensors \['0/B'\], unexpected tensors \['net.0/B'\]"),
    "common rank without a count": (lambda p: rewritten(p, ranks={"*": [1, 1]}), "number of layers"),
    "a layer the base lacks": (lambda p: rewritten(p, ranks={**RANKS, "9": [1, 1]}), "has no attribute `9`"),
    "a layer without a weight": (lambda p: rewritten(p, ranks={**RANKS, "1": [1, 1]}), "'1' no longer holds a weight"),
    "a parameter the base lacks": (lambda p: rewritten(p, trained=["4.bias"]), "has no parameter '4.bias'"),
    "a buffer the base lacks": (lambda p: rewritten(p, buffers=["0.mean"]), "has no attribute|is not a buffer"),
    "one tensor twice": (
        lambda p: rewritten(p, {"train/0.weight": torch.zeros(8, 3, 3, 3)},
                            trained=["3.weight", "3.bias", "0.weight"]),
        "'0' and 'train/0.weight' are the same tensor"),
    "wrong shape": (lambda p: rewritten(p, {"0/A": torch.zeros(3, 27)}), r"'0/A' has shape \[3, 27\] where \[2, 27\]"),
    "transposed": (lambda p: rewritten(p, {"0/B": torch.zeros(2, 8)}), r"'0/B' has shape \[2, 8\] where \[8, 2\]"),
    "scalar for a matrix": (lambda p: rewritten(p, {"0/B": torch.zeros(())}), r"shape \[\] where \[8, 2\]"),
    "NaN": (lambda p: with_value(p, "2/B", float("nan")), "NaN or infinite values in 2/B"),
    "infinite": (lambda p: with_value(p, "0/A", float("-inf")), "NaN or infinite values in 0/A"),
    "NaN scale": (lambda p: with_value(p, "0/scale", float("nan")), "NaN or infinite values in 0/scale"),
    "infinite variance": (
        lambda p: with_value(p, "train/3.running_var", float("inf")), "values in train/3.running_var"),
    "integers": (lambda p: rewritten(p, {"0/B": B0.int()}), "'0/B' is int32 where float16, bfloat16, float32"),
    "booleans": (lambda p: rewritten(p, {"0/B": B0.bool()}), "'0/B' is bool where"),
    "complex": (lambda p: rewritten(p, {"0/B": B0.to(torch.complex64)}), "'0/B' is complex64 where"),
    "float8": (lambda p: as_type(p, "F8_E4M3", 1), "'0/B' is float8_e4m3fn where"),
    "a number format that does not exist": (lambda p: as_type(p, "F77", 4), "cannot be read as safetensors"),
    "a count that is no integer": (
        lambda p: rewritten(p, {"train/3.num_batches_tracked": torch.tensor(1.5)}), "is float32 where int64 belongs"),
}  # fmt: skip


def save_plain(path: Path) -> bytes:
    save_file({"a": torch.zeros(1)}, target := path.with_name("plain.safetensors"))
    return target.read_bytes()


def everything(net: nn.Module) -> dict:
    """All that a load could have changed."""
    return {
        "state": {key: value.clone() for key, value in net.state_dict().items()},
        "tensors": [id(t) for t in (*net.parameters(), *net.buffers())],
        "classes": [type(module) for module in net.modules()],
        "attributes": [sorted(vars(module)) for module in net.modules()],
        "trainable": [name for name, p in net.named_parameters() if p.requires_grad],
        "adapters": convlora.Adapter.names(net),
        "output": net(X).detach(),
        "random": torch.get_rng_state(),
    }


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_has_its_own_error_and_leaves_the_model_bit_for_bit(case, saved, randomize):
    spoil, message = CASES[case]
    bad, net = spoil(saved), make()
    before = everything(net)
    with pytest.raises(FileError, match=message) as raised:
        convlora.load_adapter(net, bad)
    assert same(everything(net), before)
    assert str(bad.parent) in str(raised.value), "the message names the file"
    assert not saved.with_name("exploded").exists()

    adapter = convlora.inject_lora(net, rank=1, name="other")  # and beside an adapter that is there already
    randomize(adapter)
    before = everything(net)
    with pytest.raises(FileError, match=message):
        convlora.load_adapter(net, bad)
    assert same(everything(net), before)


def test_the_file_that_the_wrong_ones_are_made_of_is_right(saved):
    """Otherwise every case above could fail for another reason than its own."""
    for path in (saved, rewritten(saved), with_options(saved), with_header(saved, lambda header: None)):
        net, random = make(), torch.get_rng_state()
        adapter = convlora.load_adapter(net, path)
        assert torch.equal(torch.get_rng_state(), random), "loading takes no random numbers"
        assert list(adapter.layers) == ["0", "2"] and set(adapter.trained) == {"3.weight", "3.bias"}
    assert same(as_type(saved, "F32", 4).read_bytes()[-40:], saved.read_bytes()[-40:])
    convlora.load_adapter(make(), as_type(saved, "F32", 4))


def test_another_base_is_told_apart_by_architecture_and_by_weights(saved):
    tuned = make()
    with torch.no_grad():
        tuned[0].weight[0, 0, 0, 0] += 0.1
    wider = make()
    wider[0] = nn.Conv2d(3, 16, 3)
    for other, message in ((tuned, "with other weights"), (wider, "another architecture")):
        names, trainable = list(other.state_dict()), [p.requires_grad for p in other.parameters()]
        with pytest.raises(FileError, match=f"trained on 'toy'.*{message}"):
            convlora.load_adapter(other, saved)
        assert list(other.state_dict()) == names and [p.requires_grad for p in other.parameters()] == trainable
        assert convlora.Adapter.names(other) == []
    with pytest.raises(FileError, match="where .* belongs|does not fit|missing"):
        convlora.load_adapter(wider, saved, check_base=False)
    assert type(wider[0]) is nn.Conv2d


def test_a_header_of_640_bytes_is_no_pickle(tmp_path):
    """Its first two bytes are those of a pickle of protocol 2."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x280)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(files.read(path)[0]) == ["a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_point_format_of_a_file_loads_to_exactly_its_values(saved, dtype):
    net = make()
    path = convlora.load_adapter(net, saved).save(saved.with_name("small.safetensors"), dtype=dtype)
    stored, _ = contents(path)
    assert stored["0/A"].dtype == dtype and stored["train/3.num_batches_tracked"].dtype == torch.int64
    fresh = make()
    adapter = convlora.load_adapter(fresh, path)
    state = adapter.state_dict()
    assert all(torch.equal(state[key], stored[key].to(state[key].dtype)) for key in stored)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_values_beyond_float16_are_refused_at_saving_and_nothing_is_written(saved):
    net = make()
    adapter = convlora.load_adapter(net, saved)
    with torch.no_grad():
        adapter.layers["0"].B[0, 0] = 1e5
    with pytest.raises(FileError, match="1e[+]05 does not fit in float16.*bfloat16"):
        adapter.save(saved.with_name("half.safetensors"), dtype=torch.float16)
    assert not saved.with_name("half.safetensors").exists()
    adapter.save(saved.with_name("half.safetensors"), dtype=torch.bfloat16)


def test_an_adapter_that_diverged_is_not_saved(saved):
    adapter = convlora.load_adapter(make(), saved)
    content = saved.read_bytes()
    with torch.no_grad():
        adapter.layers["2"].A.fill_(float("nan"))
    with pytest.raises(FileError, match="cannot be saved: nothing was written; NaN or infinite values in 2/A"):
        adapter.save(saved)
    assert saved.read_bytes() == content


def test_load_state_dict_refuses_what_a_file_may_not_hold(saved):
    adapter = convlora.load_adapter(make(), saved)
    state = {key: value.clone() for key, value in adapter.state_dict().items()}
    for key, bad, message in (
        ("0/B", torch.zeros(8, 2, dtype=torch.int64), "is int64"),
        ("2/A", torch.full_like(state["2/A"], float("nan")), "NaN or infinite values in 2/A"),
    ):
        with pytest.raises(FileError, match=message):
            adapter.load_state_dict({**{k: v + 1 for k, v in state.items()}, key: bad})
        assert same(dict(adapter.state_dict()), state)


def test_the_same_module_under_two_names_is_one_layer(tmp_path, saved):
    """A file may name both; attaching twice would leave the model half adapted."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.Conv2d(3, 3, 1)

    torch.manual_seed(0)
    net = Shared()
    path = convlora.inject_lora(net).save(tmp_path / "a.safetensors")
    convlora.Adapter.of(net).remove()
    tensors, _ = contents(path)
    twice = rewritten(path, {key.replace("one", "two"): value.clone() for key, value in tensors.items()},
                      ranks={"one": [1, 1], "two": [1, 1]})  # fmt: skip
    with pytest.raises(FileError, match="'one' and 'two' are the same tensor"):
        convlora.load_adapter(net, twice)
    assert type(net.one) is nn.Conv2d and convlora.Adapter.names(net) == []
