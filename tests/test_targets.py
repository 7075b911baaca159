"""Patterns, ranks and their errors: what was wrong, with the value, and nothing changed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import convlora
from convlora.errors import RankError, TargetError


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(
            {f"b{r}": nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "norm": nn.BatchNorm2d(8)}) for r in (4, 8, 16)}
        )
        self.to_rgb = nn.Conv2d(8, 3, 1)
        self.mapping = nn.Linear(4, 8)


CONVS = ["backbone.b4.conv", "backbone.b8.conv", "backbone.b16.conv"]


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (None, None, [*CONVS, "to_rgb", "mapping"]),
        ("backbone.*", None, CONVS),
        (["backbone.b4*", "to_rgb"], None, [CONVS[0], "to_rgb"]),
        (re.compile(r"b(4|8)\."), None, CONVS[:2]),
        (lambda name, module: isinstance(module, nn.Linear), None, ["mapping"]),
        (None, ["*conv", "mapping"], ["to_rgb"]),
        ("*", re.compile("rgb$"), [*CONVS, "mapping"]),
    ],
)
def test_patterns(targets, exclude, expected):
    net = Generator()
    assert [row.name for row in convlora.adaptable(net, targets, exclude)] == expected
    assert list(convlora.inject_lora(net, targets=targets, exclude=exclude).layers) == expected


def test_adaptable_tells_shapes_and_limits():
    rows = {row.name: row for row in convlora.adaptable(Generator())}
    row = rows["to_rgb"]
    assert (row.kind, row.shape, row.matrix, row.max_rank) == ("Conv2d", (3, 8, 1, 1), (3, 8), 3)
    assert str(row) == "to_rgb: Conv2d [3, 8, 1, 1], rank up to 3"


def test_ranks_first_match_wins_and_zero_skips():
    adapter = convlora.inject_lora(Generator(), rank=1, ranks={"*b4*": 0, "backbone.*": 5})
    ranks = {name: change.A.shape[0] for name, change in adapter.layers.items()}
    assert ranks == {CONVS[1]: 5, CONVS[2]: 5, "to_rgb": 1, "mapping": 1}


def test_rank_per_kernel_multiplies_by_the_kernel_side():
    adapter = convlora.inject_lora(Generator(), rank=2, rank_per="kernel")
    assert {n: c.A.shape[0] for n, c in adapter.layers.items()} == {
        **dict.fromkeys(CONVS, 6),
        "to_rgb": 2,
        "mapping": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(targets="conv*"),
            TargetError,
            r"'conv\*' matches no adaptable layer of Generator.*Adaptable layers \(5\): backbone",
        ),
        (dict(targets="backbone.b8.conf"), TargetError, r"Close to it: backbone\.b8\.conv"),
        (dict(targets="backbone"), TargetError, r"which holds adaptable layers: try 'backbone\.\*'"),
        (dict(targets="*norm"), TargetError, r"which has no weight matrix"),
        (dict(targets=["to_rgb", "typo"]), TargetError, r"'typo' matches no adaptable layer"),
        (dict(targets=3), TargetError, r"or a list of these, not 3"),
        (dict(exclude="*"), TargetError, r"exclude='\*' leaves none"),
        (dict(train="typo"), TargetError, r"train='typo' matches no parameter"),
        (dict(rank=0), RankError, r"layer 'backbone\.b4\.conv': rank 0 is below 1"),
        (dict(rank=-1), RankError, r"rank -1 is below 1"),
        (dict(rank=1.5), RankError, r"must be a whole number, not 1\.5"),
        (dict(rank=4), RankError, r"layer 'to_rgb': rank 4 is above 3, the most its 3 × 8 matrix can have"),
        (dict(rank_per="row"), RankError, r'"matrix" or "kernel", not \'row\''),
        (dict(ranks={"typo*": 2}), TargetError, r"'typo\*' matches none of the 5 selected layers"),
        (dict(ranks={"*": 0}), TargetError, r"nothing to train"),
        (dict(path="fast"), convlora.ConvloraError, r"not 'fast'"),
        (dict(name="a.b"), convlora.ConvloraError, r"plain word.*'a\.b'"),
        (dict(name="values"), convlora.ConvloraError, r"plain word.*'values'"),
    ],
)
def test_wrong_input_names_the_rule_and_changes_nothing(arguments, error, message):
    net = Generator()
    before, classes = {k: v.clone() for k, v in net.state_dict().items()}, [type(m) for m in net.modules()]
    with pytest.raises(error, match=message):
        convlora.inject_lora(net, **arguments)
    assert [type(m) for m in net.modules()] == classes
    assert list(net.state_dict()) == list(before)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(name.startswith("_convlora") for name in vars(net))


def test_unknown_method_and_models_without_layers():
    with pytest.raises(convlora.ConvloraError, match="unknown method 'lorra'; convlora has lora"):
        convlora.inject(Generator(), "lorra")
    with pytest.raises(TargetError, match="BatchNorm2d has no layer that can be adapted"):
        convlora.inject_lora(nn.BatchNorm2d(3))
    with pytest.raises(TargetError, match="GRU"):
        convlora.inject_lora(nn.ModuleDict({"rnn": nn.GRU(2, 2), "fc": nn.Linear(2, 2)}), train=["rnn"])


def test_a_method_is_one_class_and_one_table_line(monkeypatch, tmp_path):
    """A toy method added from outside trains, merges, saves and loads like the built-in one."""
    from convlora.methods import Change

    class Scale(Change):
        def __init__(self, w0, rank, *, shape, alpha=None):
            super().__init__()
            self.g = nn.Parameter(torch.zeros(w0.shape[0], 1))

        def delta(self, w0):
            return self.g * w0

    monkeypatch.setitem(convlora.METHODS, "scale", Scale)
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    x = torch.randn(1, 3, 5, 5).double()
    y = net(x)
    adapter = convlora.inject(net, "scale")
    assert torch.equal(net(x), y)
    with torch.no_grad():
        adapter.layers["0"].g.fill_(1.0)
    changed = net(x)
    adapter.save(tmp_path / "scale.safetensors")
    adapter.merge()
    torch.testing.assert_close(net(x), changed)
    adapter.remove()
    convlora.load_adapter(net, tmp_path / "scale.safetensors")
    assert torch.equal(net(x), changed)
