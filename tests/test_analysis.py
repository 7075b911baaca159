"""How much adapters change a model, and how two of them are at odds: held against the plain definitions."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convlora
from convlora import lowrank
from convlora.analysis import block_of
from convlora.integrations.stylegan2.layers import FullyConnectedLayer, SynthesisLayer
from convlora.lowrank import Factors


class Blocks(nn.Module):
    """Two blocks with gains of very different size, as equalised learning rates have them."""

    def __init__(self):
        super().__init__()
        self.b4 = nn.ModuleDict(
            {"conv": SynthesisLayer(6, 6, 5, 4), "affine": FullyConnectedLayer(5, 6, lr_multiplier=0.01)}
        )
        self.b8 = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(3, 3)


def blocks() -> Blocks:
    torch.manual_seed(1)
    return Blocks().double()


def effective(model: nn.Module, adapter: convlora.Adapter, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    module = model.get_submodule(layer)
    gain = getattr(module, "weight_gain", 1.0)
    return gain * adapter.delta(layer).detach(), gain * module._parameters["weight"].detach()


# ------------------------------------------------------------------------------------------------ weight change


@pytest.mark.parametrize("method", ["lora", "para", "tucker", "dora", "full"])
def test_ratios_are_those_of_the_multiplied_out_change(method, randomize):
    model = blocks()
    adapter = convlora.inject(model, method, targets=["b4.conv", "b8.0", "b4.affine"])
    randomize(adapter)
    adapter.set_strength(-0.5)
    rows = adapter.weight_change()
    assert [row.name for row in rows] == list(adapter.layers)
    for row in rows:
        delta, weight = effective(model, adapter, row.name)
        assert math.isclose(row.ratio, delta.norm() / weight.norm(), rel_tol=1e-9)
        assert math.isclose(row.mean_abs, delta.abs().mean() / weight.abs().mean(), rel_tol=1e-9)
        assert row.std is None


def test_a_block_is_the_norm_of_its_layers_together_in_effective_units(randomize):
    model = blocks()
    adapter = convlora.inject_lora(model, rank=2)
    randomize(adapter, std=0.5)
    rows = {row.name: row for row in adapter.weight_change("block")}
    assert list(rows) == ["b4", "b8", ""]
    for name, row in rows.items():
        pairs = [effective(model, adapter, layer) for layer in adapter.layers if block_of(layer) == name]
        delta, weight = (torch.cat([tensor.flatten() for tensor in side]) for side in zip(*pairs))
        assert math.isclose(row.ratio, delta.norm() / weight.norm(), rel_tol=1e-9)
        assert math.isclose(row.mean_abs, delta.abs().mean() / weight.abs().mean(), rel_tol=1e-9)
    raw = [(adapter.delta(k).detach(), model.get_submodule(k)._parameters["weight"].detach()) for k in adapter.layers]
    raw_delta, raw_weight = (torch.cat([t.flatten() for t in side[:3]]) for side in zip(*raw))
    assert abs(rows["b4"].ratio * raw_weight.norm() / raw_delta.norm() - 1) > 0.01, "units make a difference here"


def test_norms_of_factors_need_no_change_of_full_size(randomize, monkeypatch):
    model = nn.Sequential(nn.Conv2d(64, 64, 3))
    adapter = convlora.inject_lora(model, rank=1)
    randomize(adapter)
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        product = matmul(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    change = adapter.layers["0"]
    size = lowrank.norm(lowrank.update_of(change, model[0]._parameters["weight"].flatten(1)))
    monkeypatch.undo()
    assert largest == 1
    assert math.isclose(size, adapter.delta("0").detach().norm(), rel_tol=1e-5)


def test_over_several_adapters_mean_and_standard_deviation(randomize):
    model = blocks()
    adapters = [convlora.inject_lora(model, name=name, targets=["b8.0", "b8.1"]) for name in "abc"]
    for scale, adapter in enumerate(adapters, 1):
        randomize(adapter, std=scale)
    single = [{row.name: row.ratio for row in convlora.weight_change(adapter)} for adapter in adapters]
    for row in convlora.weight_change(adapters):
        values = [ratios[row.name] for ratios in single]
        assert math.isclose(row.ratio, statistics.mean(values)) and math.isclose(row.std, statistics.stdev(values))


def test_a_layer_that_some_do_not_change_counts_with_zero_and_keeps_its_place(randomize):
    model = blocks()
    a = convlora.inject_lora(model, name="a", targets=["b8.0", "head"])
    b = convlora.inject_lora(model, name="b", targets=["b8.*"])
    randomize(a), randomize(b)
    rows = {row.name: row for row in convlora.weight_change([a, b])}
    assert list(rows) == ["b8.0", "b8.1", "head"]
    alone = {row.name: row.ratio for row in a.weight_change()}
    assert math.isclose(rows["head"].ratio, alone["head"] / 2)
    (block,) = [row for row in convlora.weight_change([a, b], "block") if row.name == "b8"]
    delta, weight = zip(*(effective(model, b, layer) for layer in ("b8.0", "b8.1")))
    whole = math.hypot(*(w.norm() for w in weight))
    both = [effective(model, a, "b8.0")[0].norm() / whole, math.hypot(*(d.norm() for d in delta)) / whole]
    assert math.isclose(block.ratio, statistics.mean(map(float, both)), rel_tol=1e-9)


def test_files_are_measured_on_their_base_which_stays_as_it_was(randomize, tmp_path):
    model = blocks()
    ratios = []
    for name in ("one", "two"):
        adapter = convlora.inject_lora(model, rank=1)
        randomize(adapter)
        ratios.append({row.name: row.ratio for row in adapter.weight_change()})
        adapter.save(tmp_path / f"{name}.safetensors")
        adapter.remove()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    paths = [tmp_path / "one.safetensors", str(tmp_path / "two.safetensors")]
    found = convlora.weight_change(paths, model=model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    for row in found:
        assert math.isclose(row.ratio, statistics.mean(r[row.name] for r in ratios), rel_tol=1e-6)
    with pytest.raises(convlora.ConvloraError, match="pass the base model too"):
        convlora.weight_change(paths)


def test_an_untrained_adapter_changes_nothing_and_merging_or_switching_off_changes_no_figure(randomize):
    model = blocks()
    adapter = convlora.inject_lora(model)
    assert {row.ratio for row in adapter.weight_change()} == {0.0}
    randomize(adapter)
    figures = adapter.weight_change("block")
    adapter.merge()
    assert adapter.weight_change("block") == figures
    adapter.unmerge(), adapter.disable()
    assert adapter.weight_change("block") == figures


def test_weights_of_zeros_count_as_changed_in_whole(randomize):
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    adapter = convlora.inject_lora(model)
    assert adapter.weight_change()[0].ratio == 0.0
    randomize(adapter)
    assert adapter.weight_change()[0].ratio == 1.0


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("backbone.synthesis.b8.conv0.affine", "backbone.synthesis.b8"),
        ("superresolution.block0.torgb", "superresolution.block0"),
        ("layers.3", "layers.3"),
        ("layers.3.0.conv", "layers.3"),
        ("backbone.mapping.embed", "backbone.mapping"),
        ("head", ""),
        ("", ""),
    ],
)
def test_the_block_of_a_layer(layer, block):
    assert block_of(layer) == block


def test_table_and_json_say_the_same_and_name_the_units(randomize):
    model = blocks()
    adapters = [convlora.inject_lora(model, name=name) for name in "ab"]
    randomize(adapters[0])
    one, two = adapters[0].weight_change("block"), convlora.weight_change(adapters, "block")
    content = json.loads(two.json())
    assert content["adapters"] == ["a", "b"] and content["by"] == "block" and "weight_gain" in content["units"]
    assert [row["name"] for row in content["rows"]] == ["b4", "b8", ""]
    for changes, mark in ((one, ""), (two, " ± ")):
        for row, line in zip(changes, changes.table().splitlines()[1:]):
            assert line.startswith(row.name or "(top level)") and f"{row.ratio:.2%}{mark}" in line
    assert "weight_gain" in one.table() and "over 2 adapters" in two.table()


def test_the_plot_is_a_picture_with_something_on_it(randomize, tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    model = blocks()
    adapters = [convlora.inject_lora(model, name=name) for name in "ab"]
    randomize(adapters[0])
    pixels = {}
    for name, which in (("one", adapters[:1]), ("two", adapters)):
        path = convlora.weight_change(which, "block").plot(tmp_path / f"{name}.png")
        with image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 500
            pixels[name] = picture.convert("RGB").tobytes()
    assert pixels["one"] != pixels["two"] and len(set(pixels["one"])) > 20


def test_the_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    model = blocks()
    with pytest.raises(convlora.ConvloraError, match=r'pip install "convlora\[plot\]"'):
        convlora.inject_lora(model).weight_change().plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_measured_says_why():
    model = blocks()
    adapter = convlora.inject_lora(model)
    with pytest.raises(convlora.ConvloraError, match="'layer' or 'block'|\"layer\" or \"block\", not 'blocks'"):
        adapter.weight_change("blocks")
    with pytest.raises(convlora.ConvloraError, match="at least one adapter"):
        convlora.weight_change([])


# ----------------------------------------------------------------------------------------------------- conflict


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 9), cols=st.integers(1, 12), r=st.integers(1, 6), s=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_inner_products_and_norms_of_factors_are_those_of_the_products(out, cols, r, s, seed):
    torch.manual_seed(seed)
    a = Factors(torch.randn(out, r).double(), torch.randn(r, cols).double())
    b = Factors(torch.randn(out, s).double(), torch.randn(s, cols).double())
    A, B = lowrank.dense(a), lowrank.dense(b)
    expected = float((A * B).sum())
    for x, y in ((a, b), (A, b), (a, B), (A, B)):
        assert math.isclose(lowrank.inner(x, y), expected, rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(lowrank.norm(a), A.norm(), rel_tol=1e-9)
    assert torch.equal(torch.cat(list(lowrank.rows_of(B, values=2 * cols))), B)


def test_the_cosine_is_that_of_all_changed_values_as_one_vector(randomize):
    model = blocks()
    a = convlora.inject_lora(model, name="a", rank=2)
    b = convlora.inject(model, "dora", name="b", targets=["b4.*", "b8.1"])
    randomize(a), randomize(b)
    found = convlora.conflict(a, b, signs=True)
    assert found.only_a == ["b8.0", "head"] and not found.only_b
    flat = {layer: (effective(model, a, layer)[0], effective(model, b, layer)[0]) for layer in b.layers}
    for layer in found.layers:
        x, y = (side.flatten() for side in flat[layer.name])
        assert math.isclose(layer.cosine, x @ y / x.norm() / y.norm(), rel_tol=1e-8)
        assert math.isclose(layer.ratio, x.norm() / y.norm(), rel_tol=1e-8)
        assert layer.sign_disagreement == int(((x * y) < 0).sum()) / int(((x * y) != 0).sum())
        assert layer.column_angles is None, "a DoRA has no factors"
    ab = sum(float((x * y).sum()) for x, y in flat.values())
    aa = sum(float(effective(model, a, layer)[0].square().sum()) for layer in a.layers)
    bb = sum(float(y.square().sum()) for _, y in flat.values())
    assert math.isclose(found.total.cosine, ab / math.sqrt(aa * bb), rel_tol=1e-8)
    assert math.isclose(found.total.ratio, math.sqrt(aa / bb), rel_tol=1e-8)
    names = [block.name for block in found.blocks]
    assert names == ["b4", "b8", ""]
    assert found.blocks[2].cosine is None, "the second adapter changes nothing there"


def with_factors(model, name, left, right) -> convlora.Adapter:
    adapter = convlora.inject_lora(model, rank=left.shape[1], name=name, relative=False)
    with torch.no_grad():
        adapter.layers["0"].B.copy_(left), adapter.layers["0"].A.copy_(right)
    return adapter


def test_principal_angles_of_known_spaces():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    eye, slanted = torch.eye(4).double(), math.radians(30)
    a = with_factors(model, "a", eye[:3, :2], eye[:2])
    turned = torch.stack([math.cos(slanted) * eye[0] + math.sin(slanted) * eye[2], eye[3]])
    b = with_factors(model, "b", 5 * eye[:3, 1:3], turned)
    (layer,) = convlora.conflict(a, b).layers
    assert layer.column_angles == pytest.approx([0, 90], abs=1e-6)
    assert layer.row_angles == pytest.approx([30, 90], abs=1e-6)
    assert layer.column_overlap == pytest.approx(0.5) and layer.row_overlap == pytest.approx(math.cos(slanted) ** 2 / 2)
    assert layer.ratio == pytest.approx(0.2)


def test_an_adapter_with_itself_and_with_its_opposite(randomize):
    model = blocks()
    a, b = (convlora.inject_lora(model, rank=2, name=name) for name in "ab")
    randomize(a)
    b.load_state_dict(a.state_dict())
    same = convlora.conflict(a, b, signs=True)
    b.set_strength(-2.0)
    opposite = convlora.conflict(a, b, signs=True)
    assert same.total.cosine == pytest.approx(1) and opposite.total.cosine == pytest.approx(-1)
    assert same.total.sign_disagreement == 0 and opposite.total.sign_disagreement == 1
    assert opposite.total.ratio == pytest.approx(0.5)
    for layer in opposite.layers:
        assert layer.column_overlap == pytest.approx(1) and max(layer.row_angles) < 1e-4


def test_the_overlap_of_two_para_is_that_of_their_directions(randomize):
    model = nn.Sequential(nn.Conv2d(5, 8, 3)).double()
    a, b = (convlora.inject(model, "para", rank=rank, name=name) for name, rank in (("a", 2), ("b", 3)))
    Q, R = (torch.linalg.qr(adapter.layers["0"].B.detach())[0] for adapter in (a, b))
    (layer,) = convlora.conflict(a, b).layers
    assert math.isclose(layer.column_overlap, (Q.mT @ R).square().sum() / 2, rel_tol=1e-9)


def test_a_change_of_zero_has_no_direction(randomize):
    model = blocks()
    a, b = (convlora.inject_lora(model, name=name) for name in "ab")
    randomize(a)
    found = convlora.conflict(a, b, signs=True)
    assert {layer.cosine for layer in found.layers} == {None} and found.total.ratio is None
    assert {layer.column_angles for layer in found.layers} == {None}
    json.loads(found.json(), parse_constant=pytest.fail)
    assert found.table()


def test_the_table_and_json_of_a_conflict(randomize):
    model = blocks()
    a, b = convlora.inject_lora(model, name="a"), convlora.inject_lora(model, name="b", targets="b*")
    randomize(a), randomize(b)
    found = convlora.conflict(a, b)
    content = json.loads(found.json())
    assert content["only_a"] == ["head"] and content["total"]["cosine"] == found.total.cosine
    assert [layer["name"] for layer in content["layers"]] == list(b.layers)
    table = found.table()
    assert "only 'a' changes head" in table and "block b4" in table and f"{found.total.cosine:.3f}" in table


def test_adapters_of_different_models_are_refused():
    a = convlora.inject_lora(nn.Sequential(nn.Linear(3, 3)), name="a")
    b = convlora.inject_lora(nn.Sequential(nn.Linear(4, 3)), name="b")
    with pytest.raises(convlora.ConvloraError, match="layer '0' is 3 × 3 under adapter 'a' and 3 × 4 under 'b'"):
        convlora.conflict(a, b)
