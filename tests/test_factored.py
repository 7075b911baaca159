"""Convolutions with a factored weight against the same with the weight multiplied out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convlora import factored
from convlora import geometry as geometries
from convlora.factored import LowRankWeight
from convlora.geometry import Geometry


@st.composite
def convolutions(draw):
    """(input, weight's shape, geometry) of every kind that torch and StyleGAN2 have."""
    dims, kind = draw(st.integers(1, 3)), draw(st.sampled_from(["plain", "transposed", "swapped"]))
    groups = 1 if kind == "swapped" else draw(st.sampled_from([1, 1, 2]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride = [draw(st.integers(1, 2)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    if kind != "plain":  # less than the kernel's reach, so that something is left
        padding = [min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel)]
    grid = [draw(st.integers(5, 7)) for _ in range(dims)]
    more = [0 if kind == "plain" else draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation)]
    shape = (inputs, outputs // groups) if kind == "transposed" else (outputs, inputs // groups)
    geometry = Geometry(
        tuple(stride), tuple(padding), tuple(dilation), kind != "plain", tuple(more), groups, kind == "swapped"
    )
    return (draw(st.integers(1, 2)), inputs, *grid), (*shape, *kernel), geometry


def tensors(size, shape, rank, outputs):
    made = [torch.randn(size), torch.randn(shape[0], rank), torch.randn(rank, shape[1:].numel()), torch.randn(outputs)]
    return [tensor.double().requires_grad_() for tensor in made]


def reference(x, base, left, right, bias, geometry):
    weight = base + (left @ right).view_as(base)
    return torch.convolution(x, weight.transpose(0, 1) if geometry.swapped else weight, bias, *geometry[:6])


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("skinny", [True, False])
@settings(deadline=None)
@given(case=convolutions(), rank=st.integers(1, 3), first=st.integers(0, 10))
def test_convolutions_and_their_gradients_are_those_of_the_whole_weight(sums, skinny, case, rank, first):
    size, shape, geometry = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factored, "_PASSES", 0 if sums else 1e9)
        patch.setattr(geometries, "_FEW", 1e9 if skinny else 0)
        torch.manual_seed(first)
        outputs = shape[1] * geometry.groups if geometry.transposed and not geometry.swapped else shape[0]
        base = torch.randn(shape).double()
        x, left, right, bias = inputs = tensors(torch.Size(size), torch.Size(shape), rank, outputs)
        y = factored.convolve(x, LowRankWeight(base, left, right), bias, geometry)
        expected = reference(x, base, left, right, bias, geometry)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(y)
        found = torch.autograd.grad((y.sin() * weights).sum(), inputs)
        wanted = torch.autograd.grad((expected.sin() * weights).sum(), inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


KINDS = {
    "plain": Geometry((1, 1), (1, 1), (1, 1), False, (0, 0)),
    "grouped and strided": Geometry((2, 2), (1, 1), (1, 1), False, (0, 0), 2),
    "transposed": Geometry((2, 2), (1, 1), (1, 1), True, (1, 1)),
    "swapped": Geometry((2, 2), (0, 0), (1, 1), True, (0, 0), 1, True),
}


def case(geometry, rank=2, dtype=torch.float64, side=6):
    shape = torch.Size((4, 4 // geometry.groups, 3, 3))
    base = torch.randn(shape, dtype=dtype)
    made = (torch.randn(2, 4, side, side), torch.randn(4, rank), torch.randn(rank, shape[1:].numel()), torch.randn(4))
    return base, [tensor.to(dtype).requires_grad_() for tensor in made]


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("skinny", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_gradients(name, skinny, sums, monkeypatch):
    monkeypatch.setattr(factored, "_PASSES", 0 if sums else 1e9)
    monkeypatch.setattr(geometries, "_FEW", 1e9 if skinny else 0)
    base, inputs = case(KINDS[name], side=4)

    def apply(x, left, right, bias):
        return factored.convolve(x, LowRankWeight(base, left, right), bias, KINDS[name])

    assert torch.autograd.gradgradcheck(apply, inputs, fast_mode=True)


@pytest.mark.parametrize("summed", [True, False])
def test_power_is_that_of_the_whole_weight(summed):
    base, (_, left, right, _) = case(KINDS["plain"])

    def found(left, right):
        weight = LowRankWeight(base, left, right)
        return factored.power(weight.summed() if summed else weight)

    def expected(left, right):
        return (base + (left @ right).view_as(base)).square().sum((2, 3))

    torch.testing.assert_close(found(left, right), expected(left, right))
    grads = [torch.autograd.grad(f(left, right).sin().sum(), [left, right]) for f in (found, expected)]
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradgradcheck(found, [left, right])
    lefts, rights = torch.stack([left, 2 * left]).detach(), torch.stack([right, -right]).detach()
    together = torch.func.vmap(torch.func.jacrev(found))(lefts, rights)
    each = [torch.func.jacrev(expected)(l, r) for l, r in zip(lefts, rights)]
    torch.testing.assert_close(together, torch.stack(each))


@pytest.mark.parametrize("knows", [True, False], ids=["its sum is known", "not yet"])
@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_sum_that_is_known_changes_nothing(name, sums, knows, monkeypatch):
    monkeypatch.setattr(factored, "_PASSES", 0 if sums else 1e9)
    base, inputs = case(KINDS[name])
    x, left, right, bias = inputs
    weight = LowRankWeight(base, left, right)
    y = factored.convolve(x, weight.summed() if knows else weight, bias, KINDS[name])
    expected = reference(x, base, left, right, bias, KINDS[name])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs)
    )


@pytest.mark.parametrize("rows", [2, 200], ids=["added at the output", "weights summed"])
def test_linear_maps(rows):
    base, left, right = torch.randn(9, 7).double(), torch.randn(9, 2).double(), torch.randn(2, 7).double()
    inputs = [t.requires_grad_() for t in (torch.randn(2, rows // 2, 7).double(), left, right, torch.randn(9).double())]
    x, left, right, bias = inputs
    y = factored.linear(x, LowRankWeight(base, left, right), bias)
    expected = torch.nn.functional.linear(x, base + left @ right, bias)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(out.sin().sum(), inputs) for out in (y, expected))
    torch.testing.assert_close(found, wanted)
    few = [x.detach()[:, :1].requires_grad_() if t is x else t for t in inputs]
    assert torch.autograd.gradgradcheck(lambda x, l, r, b: factored.linear(x, LowRankWeight(base, l, r), b), few)


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_many_adapters_at_once_by_vmap_and_one_graph_by_compile(name, sums, monkeypatch):
    monkeypatch.setattr(factored, "_PASSES", 0 if sums else 1e9)
    base, (x, left, right, bias) = case(KINDS[name])

    def loss(left, right):
        return factored.convolve(x, LowRankWeight(base, left, right), bias, KINDS[name]).sin().sum()

    lefts, rights = torch.stack([left, 2 * left]).detach(), torch.stack([right, -right]).detach()
    found = torch.func.vmap(torch.func.grad(loss, (0, 1)))(lefts, rights)
    each = [torch.func.grad(loss, (0, 1))(l, r) for l, r in zip(lefts, rights)]
    torch.testing.assert_close(found, tuple(torch.stack(values) for values in zip(*each)))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(left, right), [left, right]),
                               torch.autograd.grad(loss(left, right), [left, right]))  # fmt: skip


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_and_autocast(name, sums, monkeypatch):
    """Of a 16-bit convolution, the factors may be float32, and learn in it."""
    monkeypatch.setattr(factored, "_PASSES", 0 if sums else 1e9)
    base, inputs = case(KINDS[name], dtype=torch.float32)
    x, left, right, bias = inputs
    weight = LowRankWeight(base, left, right)
    expected = factored.convolve(x, weight, bias, KINDS[name])
    wanted = torch.autograd.grad(expected.sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = factored.convolve(x, weight, bias, KINDS[name])
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().sum(), inputs)
    assert [g.dtype for g in found] == [torch.float32] * 4
    for a, b in zip((y.float(), *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.detach().abs().max()))


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_that_does_not_learn_lets_the_gradient_of_its_input_through(name, sums, monkeypatch):
    monkeypatch.setattr(factored, "_PASSES", 0 if sums else 1e9)
    base, (x, left, right, bias) = case(KINDS[name])
    left, right, bias = left.detach(), right.detach(), bias.detach()
    y = factored.convolve(x, LowRankWeight(base, left, right), bias, KINDS[name])
    expected = reference(x, base, left, right, bias, KINDS[name])
    found, wanted = (torch.autograd.grad(out.sin().sum(), x) for out in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
