"""The methods: what each promises about ΔW over random shapes, and what all owe to training, merging and files."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import convlora
from convlora.methods import METHODS, LowRankChange
from convlora.methods.lidb import frame
from convlora.methods.lokr import split
from convlora.methods.para import orthonormal

ROOT = Path(__file__).parents[1]
SQUARE_ONLY = ("loralib_view", "separable")
# Every method with options that make it start as the identity, and with its other options switched on as well.
IDENTITY = {
    **{name: {} for name in METHODS if name != "para"},
    "para": {"warmup": 5},
}
VARIANTS = [
    *[(name, {}) for name in METHODS],
    ("para", {"init": "least_energy"}),
    ("lidb", {"a": 6, "b": 3, "relative": False}),
    ("dora", {"axis": "in"}),
    ("dora", {"alpha": 3.0, "rslora": True, "relative": False}),
    ("lokr", {"factor": 2, "alpha": 3.0}),
    ("lokr", {"decompose_both": True, "relative": False}),
    ("loha", {"alpha": 3.0, "relative": False}),
    ("tucker", {"alpha": 3.0}),
]
quick = settings(deadline=None, max_examples=12, derandomize=True)


@st.composite
def shapes(draw, square=False):
    """The raw shape of a linear, 1-D, 2-D or 3-D convolution weight."""
    out, inputs = draw(st.integers(2, 9)), draw(st.integers(1, 8))
    if square:
        k = draw(st.integers(0, 3))
        return (out, inputs, *[k, k][: 2 * (k > 0)])
    return (out, inputs, *draw(st.lists(st.integers(1, 3), max_size=3)))


def build(method, shape, rank=None, dtype=torch.float64, **options):
    """A change of a random weight, and the weight's matrix; the rank is brought below the method's limit."""
    w0 = torch.randn(shape, dtype=torch.float64).to(dtype).flatten(1)
    cls = METHODS[method]
    if rank is None:
        rank = cls.default_rank
    limit = cls.rank_limit(shape, options)
    return cls(w0, limit if rank is None else min(rank, limit), shape=shape, **options), w0


def randomized(change, std=1.0):
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return change


def rank_of(matrix):
    return int(torch.linalg.matrix_rank(matrix.detach().double()))


class AsFunction(nn.Module):
    """delta(w0) as a function of w0 and the trainable tensors."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, w0):
        return self.change.delta(w0)


# ------------------------------------------------------------------------------------------------- all methods


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", IDENTITY)
def test_the_start_is_the_identity_bit_for_bit(method, dtype):
    @quick
    @given(shapes(square=method in SQUARE_ONLY), st.integers(1, 3), st.integers(0, 99))
    def check(shape, rank, seed):
        torch.manual_seed(seed)
        change, w0 = build(method, shape, rank if METHODS[method].default_rank else None, dtype, **IDENTITY[method])
        assert torch.equal(w0 + change.delta(w0), w0)
        assert not change.delta(w0).any()
        wide = copy.deepcopy(change).double()  # the model is moved to another precision before training
        assert not wide.delta(w0.double()).any() or method in ("full",)

    check()


# What the rank of ΔW is for factors in general position; nothing is promised for DoRA and Full.
PROMISES = {
    "lora": lambda r, out, inputs, k: r,
    "para": lambda r, out, inputs, k: r,
    "deft": lambda r, out, inputs, k: r,
    "lidb": lambda r, out, inputs, k: r,
    "svdiff": lambda r, out, inputs, k: r,
    "adalora": lambda r, out, inputs, k: r,
    "tucker": lambda r, out, inputs, k: r,
    "loha": lambda r, out, inputs, k: r * r,
    "loralib_view": lambda r, out, inputs, k: r * round(k),  # k² kernel positions
    "separable": lambda r, out, inputs, k: r * round(k),
}


@pytest.mark.parametrize("method", PROMISES)
def test_the_rank_of_the_change_is_as_promised(method):
    @quick
    @given(shapes(square=method in SQUARE_ONLY), st.integers(1, 3), st.integers(0, 99))
    def check(shape, rank, seed):
        torch.manual_seed(seed)
        rank = min(rank, METHODS[method].rank_limit(shape, {}))
        change, w0 = build(method, shape, rank)
        if method == "svdiff":
            with torch.no_grad():
                change.shift.uniform_(0.5, 1)  # a negative one may be cut off
        else:
            randomized(change)
        promised = PROMISES[method](rank, shape[0], shape[1], math.prod(shape[2:]))
        assert rank_of(change.delta(w0)) == min(promised, *w0.shape)

    check()


@quick
@given(shapes(), st.integers(1, 3), st.integers(0, 99), st.booleans())
def test_lokrs_rank_is_the_product_of_its_factors_ranks(shape, rank, seed, both):
    torch.manual_seed(seed)
    change, w0 = build("lokr", shape, rank, decompose_both=both)
    randomized(change)
    w1 = change.w1 if hasattr(change, "w1") else change.w1_a @ change.w1_b
    w2 = change.w2 if hasattr(change, "w2") else change.w2_a @ change.w2_b
    assert rank_of(change.delta(w0)) == rank_of(w1) * rank_of(w2)
    assert hasattr(change, "w2") or rank_of(w2) <= rank


@pytest.mark.parametrize("shape", [(5, 4, 2, 2), (4, 6)], ids=str)
@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)
def test_gradients_are_those_of_finite_differences_twice(method, options, shape):
    """Also DoRA's, which goes through the norm. The second derivative is what R1 and path-length penalties need."""
    change, w0 = build(method, shape, 2 if METHODS[method].default_rank else None, **options)
    randomized(change, 0.3)
    names, values = zip(*change.named_parameters())
    module = AsFunction(change)

    def delta(*tensors):
        given = {f"change.{name}": tensor for name, tensor in zip(names, tensors)}
        return torch.func.functional_call(module, given, (w0,))

    inputs = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(delta, inputs)
    assert torch.autograd.gradgradcheck(delta, inputs, atol=1e-4)


def net():
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(6, 8, 2, 2), nn.Tanh(), nn.Conv2d(8, 5, 1),
        nn.Flatten(), nn.Linear(5 * 100, 7),
    )  # fmt: skip
    return layers.double()


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double()


def adapted(model, method, options, name="default"):
    rank = 2 if METHODS[method].default_rank else None
    return convlora.inject(model, method, rank, name=name, **options)


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)
def test_a_model_trains_merges_saves_and_is_restored(method, options, tmp_path, randomize):
    model = net()
    before, y0 = {k: v.clone() for k, v in model.state_dict().items()}, model(X).detach()
    adapter = adapted(model, method, options)
    if method != "para":
        assert torch.equal(model(X), y0)
    randomize(adapter)
    model(X).sin().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    y1 = model(X).detach()
    assert not torch.allclose(y1, y0)

    adapter.save(tmp_path / "a.safetensors")
    other = net()
    loaded = convlora.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(X), y1), "bit-exact through the file"
    assert loaded.options == adapter.options

    adapter.merge()
    torch.testing.assert_close(model(X), y1, rtol=1e-9, atol=1e-9)
    assert not any("convlora" in key for key in model.state_dict())
    adapter.unmerge()
    assert torch.equal(model(X), y1)
    adapter.remove()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(X), y0)


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if issubclass(cls, LowRankChange)])
def test_the_low_rank_path_computes_what_the_weight_path_does(method, randomize):
    low_rank = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(20, 7))
    low_rank = low_rank.double()
    weight = copy.deepcopy(low_rank)
    one = convlora.inject(low_rank, method, 2, path="low_rank")
    two = convlora.inject(weight, method, 2, path="weight")
    randomize(one)
    two.load_state_dict(one.state_dict())
    results = []
    for model, adapter in ((low_rank, one), (weight, two)):
        y = model(X)
        results.append((y, *torch.autograd.grad(y.sin().sum(), list(adapter.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_another_method_is_refused(method):
    with pytest.raises(convlora.ConvloraError, match=f"method '{method}' has no option 'sparsity'; its options: "):
        convlora.inject(net(), method, sparsity=0.5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("para", {"init": "zeros"}, "init must be one of gaussian, least_energy, not 'zeros'"),
        ("para", {"warmup": -1}, "warmup must be a whole number of at least 0, not -1"),
        ("para", {"retract": -3}, "retract must be a whole number of at least 0, not -3"),
        ("lidb", {"a": 0}, "a must be a whole number of at least 1"),
        ("lidb", {"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ("dora", {"axis": "rows"}, 'axis must be "out" or "in", not \'rows\''),
        ("lokr", {"factor": 0}, "factor must be a whole number of at least 1, or -1, not 0"),
        ("adalora", {"until": 100}, "until must be a whole number of at least 101, not 100"),
        ("adalora", {"target": 0}, "target is the mean rank at the end, above 0, not 0"),
        ("loralib_view", {"groups": 4}, "groups=4 does not divide the 6 rows"),
        ("loralib_view", {"groups": 0}, "groups must be a whole number of at least 1, not 0"),
    ],
)
def test_a_bad_value_of_an_option_is_refused_with_the_rule(method, options, message):
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    with pytest.raises(convlora.ConvloraError, match=message):
        convlora.inject(model, method, **options)
    assert type(model[0]) is nn.Conv2d and convlora.Adapter.names(model) == []


@pytest.mark.parametrize("method", ["para", "deft", "adalora"])
def test_a_step_never_waits_for_the_device(method):
    """Reading a value on the host would stall a GPU in every training step."""
    model = net()
    options = {"warmup": 2, "until": 5, "every": 1} if method == "adalora" else {"retract": 2}
    adapter = convlora.inject(model, method, 2, **options)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
            return func(*args, **(kwargs or {}))

    for _ in range(4):
        model(X).sum().backward()
        with Watch():
            adapter.step()
    with pytest.raises(AssertionError, match="read on the host"), Watch():
        X.sum().item()


# ------------------------------------------------------------------------------------------------- PaRa and DEFT


@quick
@given(shapes(), st.integers(1, 4), st.integers(0, 99), st.sampled_from(["gaussian", "least_energy"]))
def test_para_removes_r_output_directions_exactly(shape, rank, seed, init):
    torch.manual_seed(seed)
    change, w0 = build("para", shape, rank, init=init)
    change = randomized(change, 0.1)
    Q, W = orthonormal(change.B), w0 + change.delta(w0)
    rank = Q.shape[1]
    torch.testing.assert_close(Q.mT @ W, torch.zeros(rank, w0.shape[1]).double(), rtol=0, atol=1e-12)
    assert rank_of(W) == min(shape[0] - rank, w0.shape[1])


def test_paras_gradient_is_the_papers_formula():
    """∇B = −(I − P)(G·W₀ᵀ + W₀·Gᵀ)·Q·R⁻ᵀ, orthogonal to B."""
    change, w0 = build("para", (7, 5, 3, 3), 3)
    G = torch.randn_like(w0)
    (change.delta(w0) * G).sum().backward()
    Q = orthonormal(change.B).detach()
    R = Q.mT @ change.B.detach()
    expected = -(torch.eye(7).double() - Q @ Q.mT) @ (G @ w0.mT + w0 @ G.mT) @ Q @ torch.linalg.inv(R).mT
    torch.testing.assert_close(change.B.grad, expected)
    assert (change.B.mT @ change.B.grad).abs().max() < 1e-9 * change.B.grad.norm() * change.B.norm()


def test_paras_least_energy_start_removes_less_than_any_other():
    w0 = torch.randn(12, 20).double()
    least = float(METHODS["para"](w0, 2, init="least_energy").delta(w0).detach().norm())
    assert math.isclose(least, torch.linalg.svdvals(w0)[-2:].norm(), rel_tol=1e-9)
    assert all(METHODS["para"](w0, 2).delta(w0).norm() > least for _ in range(10))


@pytest.mark.parametrize("method", ["para", "deft"])
def test_retraction_keeps_the_function_and_the_optimizers_directions(method, randomize):
    model = net()
    adapter = convlora.inject(model, method, 2, retract=3)
    randomize(adapter)
    layer = adapter.layers["0"]
    with torch.no_grad():
        layer.B.mul_(5)
    y, B, tensor = model(X).detach(), layer.B.detach().clone(), layer.B
    adapter.step(), adapter.step()
    assert torch.equal(layer.B, B)
    adapter.step()
    assert layer.B is tensor, "in place: an optimizer holds this very tensor"
    torch.testing.assert_close(layer.B.mT @ layer.B, torch.eye(2).double())
    torch.testing.assert_close(model(X), y, rtol=1e-12, atol=1e-12)
    assert ((layer.B * B).sum(0) > 0).all(), "columns keep their sense, or momenta would point backwards"
    adapter.step()
    assert int(layer.steps) == 4


def test_para_warms_up_from_the_identity_and_the_warmth_is_saved(tmp_path):
    model = net()
    y0 = model(X)
    adapter = convlora.inject(model, "para", warmup=3)
    assert torch.equal(model(X), y0)
    full = METHODS["para"](torch.eye(6).double(), 1)
    warmths = []
    for _ in range(5):
        adapter.step()
        warmths.append(float(adapter.layers["0"].warmth))
    assert warmths == pytest.approx([1 / 3, 2 / 3, 1, 1, 1]) and float(full.warmth) == 1
    adapter = convlora.inject(model, "para", warmup=4, name="second")
    adapter.step()
    adapter.save(tmp_path / "half_warm.safetensors")
    loaded = convlora.load_adapter(net(), tmp_path / "half_warm.safetensors")
    assert {float(layer.warmth) for layer in loaded.layers.values()} == {0.25}


def test_para_refuses_to_erase_a_layer_and_leaves_small_ones_out():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 1))
    assert list(convlora.inject(model, "para").layers) == ["0"], "the layer with 3 rows is left out"
    assert list(convlora.inject(model, "para", min_out=0, rank=2, name="all").layers) == ["0", "1"]
    with pytest.raises(convlora.ConvloraError, match="layer '1': rank 3 is above 2"):
        convlora.inject(model, "para", min_out=0, ranks={"1": 3}, name="erased")


@pytest.mark.parametrize("method", ["para", "deft"])
def test_projections_are_computed_in_float32_under_autocast(method):
    model = nn.Sequential(nn.Linear(64, 48))
    w0 = model[0].weight.detach().clone()
    adapter = convlora.inject(model, method, 4, path="low_rank")
    change = adapter.layers["0"]
    with torch.autocast("cpu", torch.bfloat16):
        left, right = change.factors(w0)
        model(torch.randn(2, 64)).sum().backward()
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(left.mT @ left, torch.eye(4), rtol=0, atol=1e-6)
    if method == "para":
        assert (left.mT @ (w0 + left @ right)).abs().max() < 1e-6
    else:
        assert not right.any(), "the start of DEFT is the identity under autocast, too"
    assert change.B.grad.dtype == torch.float32


def test_defts_equation_holds_and_both_of_its_tensors_learn():
    """W' = (I − QQᵀ)W₀ + Q·R with R = D + Q₀ᵀW₀; also at the very start, B has a gradient."""
    change, w0 = build("deft", (7, 4, 3, 3), 2)
    (change.delta(w0) * torch.randn_like(w0)).sum().backward()
    assert change.B.grad.abs().max() > 0 and change.D.grad.abs().max() > 0
    start = orthonormal(change.B).detach().mT @ w0
    randomized(change)
    Q = orthonormal(change.B)
    torch.testing.assert_close(w0 + change.delta(w0), w0 - Q @ (Q.mT @ w0) + Q @ (change.D + start))


def test_defts_basis_does_not_jump_where_lapacks_does():
    """LAPACK's QR flips a column when its first entry changes sign; the trained D would then be turned round."""
    change, w0 = build("deft", (6, 8), 2)
    randomized(change)
    deltas = []
    for tiny in (1e-9, -1e-9):
        with torch.no_grad():
            change.B[0, 0] = tiny
        deltas.append(change.delta(w0))
    torch.testing.assert_close(*deltas, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- LiDB

FRAMES = {
    (7, 0, 512, 50): "dbe0a161f8e45f0ba3e1957c7c63ce083459efa9e60a2228e7550e7a1a514c19",
    (7, 1, 300, 100): "64855f2bcbac6158687717d8231320584840b6a14e1942539b29e2c98e42f5ca",
}


def digest(arguments):
    return hashlib.sha256(frame(*arguments).astype("<f8").tobytes()).hexdigest()


@pytest.mark.parametrize("arguments", FRAMES, ids=str)
def test_lidbs_frames_are_the_same_bits_on_every_platform(arguments):
    assert digest(arguments) == FRAMES[arguments]


def test_lidbs_frames_are_the_same_bits_in_a_fresh_process():
    code = (
        "import hashlib; from convlora.methods.lidb import frame\n"
        f"for a in {list(FRAMES)}: print(hashlib.sha256(frame(*a).astype('<f8').tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [digest(arguments) for arguments in FRAMES], done.stderr


@quick
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**64))
def test_lidbs_frames_are_orthonormal_and_their_own(n, k, seed):
    k = min(k, n)
    one = torch.tensor(frame(seed, 0, n, k))
    torch.testing.assert_close(one.mT @ one, torch.eye(k).double(), rtol=0, atol=1e-12)
    if n > 20:
        assert not torch.allclose(one, torch.tensor(frame(seed, 1, n, k)))
        assert not torch.allclose(one, torch.tensor(frame(seed + 1, 0, n, k)))
        assert one.abs().max() < 0.9, "mixed: no column is a coordinate"


@quick
@given(shapes(), st.integers(0, 99))
def test_lidb_is_an_isometry_of_its_codes(shape, seed):
    torch.manual_seed(seed)
    change, w0 = build("lidb", shape, 2, a=5, b=4, relative=False)
    randomized(change)
    torch.testing.assert_close(change.delta(w0).norm(), (change.A_train @ change.B_train).norm())
    assert change.A_train.shape[0] == min(4, w0.shape[0]) and change.B_train.shape[1] == min(5, w0.shape[1])


def test_lidbs_frames_are_not_in_files(tmp_path):
    adapter = convlora.inject(net(), "lidb", seed=3)
    assert {key.rpartition("/")[2] for key in adapter.state_dict()} == {"A_train", "B_train", "scale"}


# ------------------------------------------------------------------------------------------------- the others


def test_svdiff_shifts_singular_values_down_to_zero_at_most():
    change, w0 = build("svdiff", (5, 3, 2, 2))
    sigma = torch.linalg.svdvals(w0)
    with torch.no_grad():
        change.shift.copy_(torch.tensor([1.0, 0.5, 0, -100, -100]))
    expected = (sigma + change.shift).clamp(min=0).sort(descending=True)[0]
    torch.testing.assert_close(torch.linalg.svdvals(w0 + change.delta(w0)), expected, rtol=1e-9, atol=1e-9)
    assert [p.numel() for p in METHODS["svdiff"](w0, 2).parameters()] == [2], "a rank takes the leading ones"


@pytest.mark.parametrize("method", ["svdiff", "dora", "lora", "deft"])
def test_a_layer_that_starts_at_zero_still_learns(method):
    w0 = torch.zeros(5, 12).double()
    change = METHODS[method](w0, 2, shape=(5, 3, 2, 2))
    optimizer = torch.optim.SGD(change.parameters(), lr=0.1)
    target = torch.randn(5, 12).double()
    losses = []
    for _ in range(20):
        loss = (change.delta(w0) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in change.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("axis", "over"), [("out", (1, 2, 3)), ("in", (0, 2, 3))])
def test_doras_magnitude_is_the_norm_of_the_effective_weight(axis, over):
    change, w0 = build("dora", (5, 4, 3, 3), 2, axis=axis)
    randomized(change, 0.2)
    W = (w0 + change.delta(w0)).view(5, 4, 3, 3)
    torch.testing.assert_close(torch.linalg.vector_norm(W, dim=over), change.magnitude.abs())
    V = (w0 + change.scale * change.B @ change.A).view(5, 4, 3, 3)
    cosine = (W * V).sum(over) / (W.square().sum(over) * V.square().sum(over)).sqrt()
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine))


def test_doras_zero_rows_are_no_nan():
    w0 = torch.randn(4, 6).double()
    w0[1] = 0
    change = METHODS["dora"](w0, 2)
    assert torch.equal(w0 + change.delta(w0), w0)
    change.delta(w0).sum().backward()
    assert all(p.grad.isfinite().all() for p in change.parameters()) and change.B.grad[1].abs().max() > 0


@quick
@given(shapes(), st.integers(1, 3), st.integers(0, 99))
def test_tucker_loha_and_lokr_compute_their_equations(shape, rank, seed):
    torch.manual_seed(seed)
    kernel = tuple(shape[2:]) or (1,)
    tucker, w0 = build("tucker", shape, rank, alpha=3.0, relative=False)
    randomized(tucker)
    assert (tucker.core is None) == (math.prod(kernel) == 1)
    if tucker.core is not None:
        core = tucker.core.flatten(2)
        expected = torch.einsum("op,pqk,qi->oik", tucker.U, core, tucker.V).flatten(1)
    else:
        expected = tucker.U @ tucker.V
    torch.testing.assert_close(tucker.delta(w0), 3 / len(tucker.V) * expected)

    loha, w0 = build("loha", shape, rank, alpha=3.0, relative=False)
    randomized(loha)
    expected = torch.einsum("or,rc,os,sc->oc", loha.w1_a, loha.w1_b, loha.w2_a, loha.w2_b)
    torch.testing.assert_close(loha.delta(w0), 3 / len(loha.w1_b) * expected)

    lokr, w0 = build("lokr", shape, rank, alpha=3.0, relative=False)
    randomized(lokr)
    o2, i2 = split(shape[0], -1)[1], split(shape[1], -1)[1]
    full = hasattr(lokr, "w2")
    w2 = (lokr.w2 if full else lokr.w2_a @ lokr.w2_b).view(o2, i2, *kernel)
    expected = torch.einsum("ab,cd...->acbd...", lokr.w1, w2).reshape(w0.shape)
    torch.testing.assert_close(lokr.delta(w0), (1 if full else 3 / len(lokr.w2_b)) * expected)


def test_alpha_over_rank_is_applied_once_merged_or_not(randomize):
    """LyCORIS's merge_to applies it twice for LoHa and low-rank LoKr."""
    for method in ("loha", "lokr"):
        model = net()
        adapter = convlora.inject(model, method, 2, alpha=6.0)
        randomize(adapter)
        y = model(X)
        adapter.merge()
        torch.testing.assert_close(model(X), y, rtol=1e-9, atol=1e-9)
        adapter.unmerge()
        plain = convlora.inject(net(), method, 2)
        plain.load_state_dict({**adapter.state_dict(), **{k: v for k, v in plain.state_dict().items() if "scale" in k}})
        for layer in adapter.layers:
            ratio = float((adapter.delta(layer).norm() / plain.delta(layer).norm()).detach())
            full = hasattr(adapter.layers[layer], "w2")
            assert math.isclose(ratio, 1 if full else 3, rel_tol=1e-9), (method, layer)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(512, -1, (16, 32)), (36, -1, (6, 6)), (7, -1, (1, 7)), (512, 8, (8, 512 // 8)), (512, 128, (4, 128)),
     (360, 7, (6, 60)), (1, -1, (1, 1))],
)  # fmt: skip
def test_lokr_splits_sizes_as_lycoris_does(size, factor, expected):
    assert split(size, factor) == expected


@quick
@given(shapes(square=True), st.integers(1, 2), st.integers(0, 99))
def test_the_two_wrong_layouts_follow_their_index_formulas(shape, rank, seed):
    torch.manual_seed(seed)
    out, inputs, k = shape[0], shape[1], (*shape, 1)[2]
    for method in SQUARE_ONLY:
        change, w0 = build(method, shape, rank, alpha=3.0, relative=False)
        randomized(change)
        scale = 3 / (change.A.shape[0] // k)
        delta = change.delta(w0).view(out, inputs, k, k)
        for o, i, u, v in [(o, i, u, v) for o in range(out) for i in range(inputs) for u in range(k) for v in range(k)]:
            if method == "loralib_view":
                flat = i * k + u
                row, column = o * k + flat // inputs, flat % inputs * k + v
            else:
                row, column = o * k + u, i * k + v
            torch.testing.assert_close(delta[o, i, u, v], scale * change.B[row] @ change.A[:, column])


def test_loralibs_layout_with_groups_has_loralibs_sizes():
    change, w0 = build("loralib_view", (6, 2, 3, 3), 2, groups=2, relative=False)  # Conv2d(4, 6, 3, groups=2)
    assert change.A.shape == (2 * 3, 4 * 3) and change.B.shape == (6 // 2 * 3, 2 * 3)
    randomized(change)
    torch.testing.assert_close(change.delta(w0).view(6, 2, 3, 3), (change.B @ change.A).view(6, 2, 3, 3))


@pytest.mark.parametrize("method", SQUARE_ONLY)
def test_the_wrong_layouts_refuse_kernels_they_are_not_defined_for(method):
    for layer in (nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (1, 3)), nn.Conv3d(4, 6, 3)):
        with pytest.raises(convlora.ConvloraError, match="linear layers and square 2-D kernels"):
            convlora.inject(nn.Sequential(layer), method)


# ------------------------------------------------------------------------------------------------- AdaLoRA


def pruned(model, x, rank=4, steps=60, **options):
    options = {"target": 1.5, "warmup": 10, "until": 40, "every": 5, **options}
    adapter = convlora.inject(model, "adalora", rank, **options)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    target = torch.randn_like(model(x))
    kept = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        adapter.step()
        kept.append(sum(int(layer.mask.sum()) for layer in adapter.layers.values()))
    return adapter, kept


def test_adalora_prunes_to_its_budget_and_its_file_gives_the_same_output(tmp_path):
    model = net()
    adapter, kept = pruned(model, X)
    ranks = 4 * len(adapter.layers)
    assert kept[:10] == [ranks] * 10, "nothing before the warm-up is over"
    assert all(a >= b for a, b in zip(kept, kept[1:]))
    assert kept[39:] == [round(1.5 * len(adapter.layers))] * 21
    for layer in adapter.layers.values():
        assert not layer.E[~layer.mask].any() and layer.E[layer.mask].all()
    adapter.save(tmp_path / "pruned.safetensors")
    other = net()
    loaded = convlora.load_adapter(other, tmp_path / "pruned.safetensors")
    torch.testing.assert_close(other(X), model(X), rtol=1e-12, atol=1e-12)
    assert sum(len(layer.E) for layer in loaded.layers.values()) == kept[-1]
    assert set(loaded.layers) == {name for name, layer in adapter.layers.items() if layer.mask.any()}
    before = [len(layer.E) for layer in loaded.layers.values()]
    other(X).sum().backward()
    for _ in range(10):
        loaded.step()
    assert [int(layer.mask.sum()) for layer in loaded.layers.values()] == before, "its ranks are final"


def test_adalora_keeps_the_triplets_of_the_highest_scores():
    model = net()
    adapter = convlora.inject(model, "adalora", 4, target=2, warmup=0, until=1)
    layers = list(adapter.layers.values())
    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        with torch.no_grad():
            layer.E.uniform_(0.5, 1)
    twins = copy.deepcopy(layers)
    scores = []
    for layer, twin in zip(layers, twins):  # equations 8 to 11 at the first step, where the averages start from zero
        smoothed = {}
        for name in "PEQ":
            sensitivity = (getattr(twin, name) * getattr(layer, name).grad).abs().detach()
            mean = 0.15 * sensitivity
            smoothed[name] = mean * 0.15 * (sensitivity - mean).abs()
        scores.append(smoothed["E"] + smoothed["P"].mean(0) + smoothed["Q"].mean(1))
    adapter.step()
    threshold = torch.cat(scores).sort(descending=True)[0][2 * len(layers) - 1]
    assert [layer.mask.tolist() for layer in layers] == [(score >= threshold).tolist() for score in scores]


def test_adalora_gives_its_budget_to_the_layer_that_matters():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.matters, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.matters(x) + 1e-3 * self.idle(x)

    adapter, _ = pruned(Two(), torch.randn(16, 8), target=2)
    assert {name: int(layer.mask.sum()) for name, layer in adapter.layers.items()} == {"matters": 4, "idle": 0}
    tensors, record = adapter.to_be_saved()
    assert list(record.ranks) == ["matters"] and not any(key.startswith("idle") for key in tensors)


def test_adaloras_pruned_triplets_can_win_their_budget_back():
    """First one layer decides, then the other: as in the paper, pruning is not for ever until the schedule ends."""
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"first": nn.Linear(8, 8), "then": nn.Linear(8, 8)}), torch.randn(16, 8)
    adapter = convlora.inject(model, "adalora", 4, target=2, warmup=5, until=300, every=1)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    goal, ranks = torch.randn(16, 8), []
    for step in range(300):
        first, then = (1.0, 1e-2) if step < 150 else (1e-2, 1.0)
        optimizer.zero_grad()
        loss = first * (model["first"](x) - goal).square().mean() + then * (model["then"](x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        adapter.step()
        ranks.append([int(layer.mask.sum()) for layer in adapter.layers.values()])
    assert ranks[149][1] < 4 and ranks[-1][1] > ranks[149][1]
    assert ranks[-1] == ranks[-2] and sum(ranks[-1]) == 4


def test_adalora_asks_for_gradients_it_does_not_find():
    model = net()
    adapter = convlora.inject(model, "adalora", 2)
    optimizer = torch.optim.SGD(adapter.parameters())
    model(X).sum().backward()
    optimizer.zero_grad()
    with pytest.raises(convlora.ConvloraError, match=r"call adapter.step\(\) after optimizer.step\(\) and before"):
        adapter.step()


def test_adaloras_penalty_is_zero_at_the_start_and_pulls_back(randomize):
    adapter = convlora.inject(net(), "adalora", 2)
    penalty = sum(layer.penalty() for layer in adapter.layers.values())
    assert penalty < 1e-20
    randomize(adapter)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        penalty = sum(layer.penalty() for layer in adapter.layers.values())
        penalty.backward()
        optimizer.step()
    assert penalty < 1e-3


# ------------------------------------------------------------------------------------------------- full size


@pytest.fixture(scope="module")
def full_size():
    from convlora.integrations import eg3d

    return eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"])


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("lora", {}, 91_110),
        ("loralib_view", {}, 140_262),
        ("separable", {}, 140_262),
        ("tucker", {}, 39_807),
        ("deft", {}, 91_110),
        ("para", {}, 16_576),
        ("para", {"min_out": 0}, 16_582),
        ("lidb", {}, 7_688),
        ("lidb", {"a": 50, "b": 100}, 7_510),
    ],
)
def test_the_papers_numbers_of_trainables_on_eg3d(full_size, method, options, count):
    targets = ["backbone.synthesis.*", "superresolution.*"]
    adapter = convlora.inject(full_size, method, 1, targets=targets, **options)
    assert adapter.num_parameters == count
    adapter.remove()


def test_svdiff_has_one_number_per_singular_value_of_eg3d(full_size):
    layers = convlora.adaptable(full_size, ["backbone.synthesis.*", "superresolution.*"])
    assert len(layers) == 52 and sum(layer.max_rank for layer in layers) == 16_582


def test_the_docs_table_of_methods_is_made_by_running(tmp_path):
    arguments = ["--out", str(tmp_path / "t.md"), "--no-eg3d", "--methods", "lora,para", "--layers"]
    arguments += ["conv 3×3,StyleGAN2 ToRGB"]
    program = [sys.executable, str(ROOT / "docs" / "make_methods_table.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert re.search(r"\| conv 3×3 \| (0|\de-1\d) \| (0|\de-1\d) \|\n", made), made
    assert re.search(r"\| StyleGAN2 ToRGB \| (0|\de-1\d) \| left out \|\n", made), made
    kept = (ROOT / "docs" / "methods_table.md").read_text(encoding="utf-8")
    assert "**no" not in kept, "what the page promises of every method holds on every layer"
    assert all(f"| `{method}` |" in kept for method in METHODS)
    described = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^## .*`{method}`", described, re.M) for method in METHODS)
