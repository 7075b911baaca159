"""Which way each layer computes, and what `explain` says of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import convlora


def net() -> nn.Sequential:
    layers = (nn.Conv2d(16, 64, 3), nn.Conv2d(64, 2, 1), nn.ConvTranspose2d(2, 16, 4), nn.Flatten(), nn.Linear(16, 16))
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def test_explain_prints_path_and_reason_of_every_layer(capsys) -> None:
    model = net()
    with pytest.raises(convlora.ConvloraError, match="Sequential has no adapted layer; convlora.inject_lora"):
        convlora.explain(model)
    convlora.inject_lora(model, rank=4, ranks={"1": 1, "2": 1}, name="lora")
    convlora.inject(model, "dora", rank=1, targets=["4"], name="dora")
    convlora.inject_lora(model, rank=1, targets=["0"], path="weight", name="slow")
    rows = {(row.layer, row.adapter): (row.path, row.reason) for row in convlora.explain(model)}
    assert rows == {
        ("0", "lora"): ("low_rank", "rank 4 of 16 channels"),
        ("1", "lora"): ("weight", "rank 1 is more than a quarter of 2 channels"),
        ("2", "lora"): ("weight", "rank 1 is more than a quarter of 2 channels"),
        ("4", "lora"): ("low_rank", "rank 4 of 16 channels"),
        ("4", "dora"): ("weight", "ΔW of DoRA is no product of factors"),
        ("0", "slow"): ("low_rank", "the layer is on the low-rank path of adapter 'lora'"),
    }
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) and printed[0] == "0  lora  low_rank  rank 4 of 16 channels"
    convlora.Adapter.of(model, "slow").merge()
    assert convlora.explain(model)[-1].path == "merged"


def test_a_rank_above_a_quarter_of_the_channels_takes_the_weight_path_unless_asked() -> None:
    for rank, path, expected in ((4, "auto", "low_rank"), (5, "auto", "weight"), (5, "low_rank", "low_rank")):
        model = net()
        convlora.inject_lora(model, rank=rank, targets=["0"], path=path)
        assert [row.path for row in convlora.explain(model)] == [expected]


def test_the_low_rank_path_leaves_with_the_adapter_that_brought_it() -> None:
    """What stays computes as if it had been alone from the beginning, to the last bit."""
    model, x = net(), torch.randn(2, 16, 3, 3)
    convlora.inject_lora(model, 4, targets=["0"], name="first")
    second = convlora.inject_lora(model, 4, targets=["0"], path="weight", name="second")
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    assert [row.path for row in convlora.explain(model)] == ["low_rank", "low_rank"]
    with_both = copy.deepcopy(model)
    for one in (model, with_both, pickle.loads(pickle.dumps(with_both))):
        convlora.Adapter.of(one, "first").remove()
        assert [row.path for row in convlora.explain(one)] == ["weight"]
        layer = one[0]
        whole = nn.functional.conv2d(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), whole)
    first = convlora.inject_lora(model, 4, targets=["0"], name="first")
    first.merge()
    assert convlora.explain(model)[0].path == "weight"
    first.unmerge()
    assert [row.path for row in convlora.explain(model)] == ["low_rank", "low_rank"]
