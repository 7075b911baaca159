"""Codes of LiDB adapters: one change in every gauge, packed and unpacked, many people in one batch as one at a time."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_generator

import convlora
from convlora.errors import ConvloraError
from convlora.integrations import eg3d, stylegan2
from convlora.integrations.eg3d import cameras
from convlora.integrations.eg3d.hyper.codes import (
    Codes,
    Layer,
    Layout,
    calling,
    canonical,
    distance,
    layout_of,
    pack,
    put,
    squares,
    start,
    unpack,
)
from convlora.integrations.eg3d.hyper.examples import render
from convlora.integrations.eg3d.personalize import TARGETS
from convlora.methods.lidb import LiDB

LAYOUT = Layout((Layer("one", 5, 7), Layer("two", 3, 9), Layer("three", 2, 2)), 1)


def random_codes(layout: Layout, count: int, seed: int = 0, size: float = 1.0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    left, right = layout.used()
    drawn = (torch.randn(count, *used.shape, generator=generator) * used * size for used in (left, right))
    return Codes(*drawn)


def adapter_on(G, rank: int = 1, **options):
    return convlora.inject(G, "lidb", rank, targets=list(TARGETS), path="low_rank", **options)


@given(
    rank=st.integers(1, 2), seed=st.integers(0, 10**6),
    scale=st.floats(0.01, 100).flatmap(lambda s: st.sampled_from([s, -s])),
)  # fmt: skip
def test_distances_and_canonical_form_are_the_same_in_every_gauge(rank: int, seed: int, scale: float) -> None:
    layout = LAYOUT._replace(rank=rank)
    codes, others = (Codes(*(x.double() for x in random_codes(layout, 2, seed + i))) for i in range(2))
    turn = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0] * scale
    regauged = Codes(codes.left @ turn, torch.linalg.solve(turn, codes.right))
    assert torch.allclose(distance(codes, others), distance(regauged, others), rtol=1e-9)
    assert torch.allclose(
        distance(codes, regauged), torch.zeros(2, 3).double(), atol=1e-8 * float(squares(codes).max())
    )
    # the products themselves, formed
    dense = (codes.left @ codes.right - others.left @ others.right).square().sum((-1, -2))
    assert torch.allclose(distance(codes, others), dense, rtol=1e-9)
    one, same = canonical(codes), canonical(regauged)
    for a, b in zip(one, same):
        assert torch.allclose(a, b, atol=1e-8)
    assert torch.allclose(one.left @ one.right, codes.left @ codes.right, atol=1e-9)


def test_canonical_factors_have_equal_norms_and_a_positive_largest_entry() -> None:
    codes = random_codes(LAYOUT, 4)
    codes.left[0, 1] = 0  # a person who does not change this layer: any right is the same
    found = canonical(codes)
    norms = [x.flatten(2).norm(dim=2) for x in found]
    assert torch.allclose(*norms, atol=1e-6) and float(norms[0][0, 1]) == float(norms[1][0, 1]) == 0
    largest = found.left.gather(2, found.left.abs().argmax(2, keepdim=True))
    assert bool((largest >= 0).all())
    assert all(torch.equal(x, y) or torch.allclose(x, y, atol=1e-6) for x, y in zip(canonical(found), found))
    # padding stays padding
    assert all(bool((x[:, ~used] == 0).all()) for x, used in zip(found, LAYOUT.used()))


def test_packing_is_undone_by_unpacking() -> None:
    codes = random_codes(LAYOUT, 3)
    tensors = unpack(LAYOUT, codes)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "one/A_train": (3, 5, 1), "one/B_train": (3, 1, 7), "two/A_train": (3, 3, 1), "two/B_train": (3, 1, 9),
        "three/A_train": (3, 2, 1), "three/B_train": (3, 1, 2),
    }  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(pack(LAYOUT, tensors), codes))
    alone = pack(LAYOUT, {key: value[1] for key, value in tensors.items()})
    assert all(torch.equal(a, b) for a, b in zip(alone, codes.rows(slice(1, 2))))
    assert sum(used.sum() for used in LAYOUT.used()) == LAYOUT.numbers == 28
    with pytest.raises(ConvloraError, match=r"layer 'two' need B_train of shape \(N, 1, 9\), got nothing"):
        pack(LAYOUT, {key: value for key, value in tensors.items() if key != "two/B_train"})
    with pytest.raises(ConvloraError, match=r"layer 'one' need A_train of shape \(N, 5, 1\), got shape \(3, 4, 1\)"):
        pack(LAYOUT, tensors | {"one/A_train": torch.zeros(3, 4, 1)})


def test_a_distance_of_codes_is_one_of_weights() -> None:
    G = tiny_generator()
    adapter = adapter_on(G)
    layout = layout_of(adapter)
    codes = random_codes(layout, 2)
    deltas = []
    for i in range(2):
        put(adapter, codes.rows(slice(i, i + 1)))
        deltas.append({name: adapter.delta(name) for name in layout.names})
    found = distance(codes.rows(slice(0, 1)), codes.rows(slice(1, 2)))[0]
    for i, name in enumerate(layout.names):
        scale = adapter.layers[name].scale
        assert torch.allclose((deltas[0][name] - deltas[1][name]).square().sum(), scale**2 * found[i], rtol=1e-3)


def test_a_batch_of_different_people_is_each_of_them_alone_and_gradients_reach_their_codes() -> None:
    G = tiny_generator().double()
    adapter = adapter_on(G)
    layout = layout_of(adapter)
    codes = Codes(*(x.double().requires_grad_() for x in random_codes(layout, 3, size=0.3)))
    w, labels = torch.randn(3, 8).double(), cameras.random_views(3, seed=0).double()
    together = render(adapter, G, w, labels, codes, layout, deterministic=True)
    plain = render(None, G, w, labels, deterministic=True)
    for i in range(3):
        one = slice(i, i + 1)
        alone = render(adapter, G, w[one], labels[one], codes.rows(one), layout, deterministic=True)
        put(adapter, codes.detach().rows(one))
        held = render(None, G, w[one], labels[one], deterministic=True)
        put(adapter, start(layout, 1))
        for name in ("image", "image_raw"):
            assert torch.allclose(together[name][one], alone[name], atol=1e-9)
            assert torch.allclose(together[name][one], held[name], atol=1e-9)
            assert float((together[name][one] - plain[name][one]).detach().abs().max()) > 1e-3
    each = together["image"].square().flatten(1).sum(1)
    (grads,) = [torch.autograd.grad(each[1], list(codes))]
    for grad, used in zip(grads, layout.used()):
        assert bool((grad[1][used] != 0).float().mean() > 0.9)
        assert bool((grad[[0, 2]] == 0).all()), "a person's picture depends on that person's codes alone"


def test_codes_work_on_stylegan2_too() -> None:
    torch.manual_seed(0)
    G = stylegan2.Generator(8, 0, 8, 16, 3, synthesis_kwargs={"channel_base": 64, "channel_max": 8}).eval()
    adapter = convlora.inject(G, "lidb", 2, targets=["synthesis.*"], ranks={"*torgb": 2}, path="low_rank")
    layout = layout_of(adapter)
    codes = random_codes(layout, 2, size=0.3)
    ws = torch.randn(2, 1, 8).expand(-1, G.num_ws, -1)
    with torch.no_grad():
        both = calling(adapter, codes, lambda model: model.synthesis(ws, noise_mode="const"))
        for i in range(2):
            put(adapter, codes.rows(slice(i, i + 1)))
            assert torch.allclose(G.synthesis(ws[i : i + 1], noise_mode="const"), both[i : i + 1], atol=1e-5)


def test_all_people_begin_alike_and_as_nobody() -> None:
    G = tiny_generator()
    adapter = adapter_on(G)
    layout = layout_of(adapter)
    begin = start(layout, 3, seed=4)
    assert all(torch.equal(x[0], x[2]) for x in begin) and not torch.equal(begin.right, start(layout, 3, seed=5).right)
    assert float(squares(begin).abs().max()) == 0
    # rows of about unit size, as an adapter of its own begins with
    assert 0.7 < float(begin.right[0].flatten(1).norm(dim=1).mean()) < 1.3
    w, labels = torch.randn(3, 8), cameras.random_views(3, seed=0)
    changed, plain = (render(adapter, G, w, labels, c, deterministic=True)["image"] for c in (begin, None))
    assert torch.allclose(changed, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        (lambda G: convlora.inject_lora(G, 1), r"codes are those of a \"lidb\" adapter .* 'default' is 'lora'"),
        (lambda G: convlora.inject(G, "lidb", 1, train=["decoder"]), "with tensors trained in full"),
        (lambda G: convlora.inject(G, "lidb", 1, ranks={"*b8.conv0": 2, "*": 1}), r"one rank on all layers.*\[1, 2\]"),
    ],
)
def test_other_adapters_have_no_codes(inject, message) -> None:
    with pytest.raises(ConvloraError, match=message):
        layout_of(inject(tiny_generator()))


def test_one_adapter_holds_one_person() -> None:
    adapter = adapter_on(tiny_generator())
    layout = layout_of(adapter)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    with pytest.raises(ConvloraError, match=r"holds one person's codes \(1, 28, 12, 1\), not \(2, 28"):
        put(adapter, random_codes(layout, 2))
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_a_person_on_the_full_size_generator_is_7688_numbers(tmp_path) -> None:
    with torch.device("meta"):
        G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS["ffhq512-128"])
    sizes = {row.name: row.matrix for row in convlora.adaptable(G, list(TARGETS))}
    assert len(sizes) == 52
    assert sum(min(50, out) + min(100, cols) for out, cols in sizes.values()) == 7688
    layout = Layout(tuple(Layer(name, min(50, out), min(100, cols)) for name, (out, cols) in sizes.items()), 1)
    assert layout.numbers == 7688 and 2 * layout.numbers < 16_000  # bytes in float16, without the file's header


FRAME = """
import hashlib
from convlora.methods.lidb import frame
print(hashlib.sha256(frame(3, 1, 1152, 100).tobytes()).hexdigest())
"""


def test_frames_are_the_same_in_another_process() -> None:
    import hashlib

    from convlora.methods.lidb import frame

    done = subprocess.run([sys.executable, "-c", FRAME], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == hashlib.sha256(frame(3, 1, 1152, 100).tobytes()).hexdigest()
    change = LiDB(torch.randn(64, 90), 1, seed=3)
    eye = change.A_aux.mT @ change.A_aux
    assert torch.allclose(eye, torch.eye(50), atol=1e-5)
