"""Codes: the numbers of LiDB adapters of N people, as two tensors, and how a model computes with them all at once.

A layer's change is `s · A_aux · left · right · B_aux` with left `(b, r)` and right `(r, a)`. The frames are
orthonormal, so ‖left · right‖ is the size of the change and distances between codes are distances between weights, in
units of each layer's own scale s. But `(left · T, T⁻¹ · right)` is the same change: codes are compared by their
products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convlora import Adapter
from convlora.errors import ConvloraError
from convlora.methods.lidb import LiDB

T = TypeVar("T")
LEFT, RIGHT = "A_train", "B_train"


class Layer(NamedTuple):
    """One adapted layer: the sizes of its frames, b on the output side and a on the input side."""

    name: str
    b: int
    a: int


class Layout(NamedTuple):
    """Which layers codes are of, in the model's order, and their rank."""

    layers: tuple[Layer, ...]
    rank: int

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    @property
    def numbers(self) -> int:
        """How many numbers a person is."""
        return self.rank * sum(layer.a + layer.b for layer in self.layers)

    @property
    def b(self) -> int:
        return max(layer.b for layer in self.layers)

    @property
    def a(self) -> int:
        return max(layer.a for layer in self.layers)

    def used(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Which entries of `Codes` are numbers of a layer and which its padding: (L, b, r) and (L, r, a), bool."""
        b, a = (torch.tensor(sizes, device=device) for sizes in zip(*((layer.b, layer.a) for layer in self.layers)))
        left = torch.arange(self.b, device=device)[None, :, None] < b[:, None, None]
        right = torch.arange(self.a, device=device)[None, None, :] < a[:, None, None]
        return left.expand(-1, -1, self.rank), right.expand(-1, self.rank, -1)


class Codes(NamedTuple):
    """left (N, L, b, r) and right (N, L, r, a) of N people on L layers; 0 where a layer has smaller frames."""

    left: Tensor
    right: Tensor

    def rows(self, which: Tensor | slice) -> Codes:
        """Of some people, or of all of them in another order."""
        return Codes(self.left[which], self.right[which])

    def to(self, device: torch.device | str) -> Codes:
        return Codes(self.left.to(device), self.right.to(device))

    def detach(self) -> Codes:
        return Codes(self.left.detach(), self.right.detach())


def layout_of(adapter: Adapter) -> Layout:
    """The layout of an adapter's codes.

    Raises:
        ConvloraError: it is no LiDB, trains other tensors too, or its layers have different ranks.
    """
    if adapter.method != "lidb" or adapter.trained or adapter.record.buffers:
        raise ConvloraError(
            f'codes are those of a "lidb" adapter that trains nothing else, and {adapter.name!r} is '
            f"{adapter.method!r}{' with tensors trained in full' if adapter.trained else ''}: "
            'convlora.inject(G, "lidb", 1, targets=…)'
        )
    changes = {name: cast(LiDB, change) for name, change in adapter.layers.items()}
    ranks = {change.A_train.shape[-1] for change in changes.values()}
    if len(ranks) > 1:
        raise ConvloraError(f"codes have one rank on all layers, and those of {adapter.name!r} are {sorted(ranks)}")
    sizes = (Layer(name, change.A_train.shape[-2], change.B_train.shape[-1]) for name, change in changes.items())
    return Layout(tuple(sizes), ranks.pop())


def pack(layout: Layout, tensors: Mapping[str, Tensor]) -> Codes:
    """Codes of `{"<layer>/A_train": (N, b, r), "<layer>/B_train": (N, r, a)}`, or of one person's without the N.

    Raises:
        ConvloraError: a tensor is missing or has another shape than the layout says.
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    for layer in layout.layers:
        for end, shape, found in ((LEFT, (layer.b, layout.rank), lefts), (RIGHT, (layout.rank, layer.a), rights)):
            tensor = tensors.get(f"{layer.name}/{end}")
            if tensor is None or tuple(tensor.shape[-2:]) != shape or tensor.ndim not in (2, 3):
                have = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ConvloraError(
                    f"codes of layer {layer.name!r} need {end} of shape (N, {shape[0]}, {shape[1]}), got {have}"
                )
            found.append(tensor if tensor.ndim == 3 else tensor[None])
    pad = nn.functional.pad
    left = torch.stack([pad(x, (0, 0, 0, layout.b - x.shape[-2])) for x in lefts], 1)
    return Codes(left, torch.stack([pad(x, (0, layout.a - x.shape[-1])) for x in rights], 1))


def unpack(layout: Layout, codes: Codes) -> dict[str, Tensor]:
    """The inverse of `pack`: what each layer computes with, (N, b, r) and (N, r, a); differentiable."""
    found = {}
    for i, layer in enumerate(layout.layers):
        found[f"{layer.name}/{LEFT}"] = codes.left[:, i, : layer.b]
        found[f"{layer.name}/{RIGHT}"] = codes.right[:, i, :, : layer.a]
    return found


def start(layout: Layout, count: int, seed: int = 0, device: torch.device | str = "cpu") -> Codes:
    """The codes that all people begin with: left 0, so that nothing changes, right normal with rows of unit size.

    The same for everyone, so that the codes found from there differ by the people and not by their starts.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = layout.used()
    sizes = torch.tensor([layer.a for layer in layout.layers])[:, None, None]
    drawn = torch.randn(right.shape, generator=generator) * right / sizes.sqrt()
    codes = Codes(torch.zeros(left.shape), drawn)
    return Codes(*(x.expand(count, -1, -1, -1).to(device) for x in codes))


def squares(codes: Codes) -> Tensor:
    """(N, L): ‖left · right‖² of each layer, the squared size of its change in units of the layer's scale."""
    return _inner(codes, codes)


def distance(codes: Codes, others: Codes) -> Tensor:
    """(N, L): ‖left · right − left' · right'‖² of each layer, the same in every gauge.

    At rank 1 that is |a|²|b|² + |â|²|b̂|² − 2(a·â)(b·b̂). No product of the factors is formed.
    """
    return squares(codes) + squares(others) - 2 * _inner(codes, others)


def _inner(one: Codes, other: Codes) -> Tensor:
    """⟨left · right, left' · right'⟩ = tr((left'ᵀ left)(right right'ᵀ)) of each layer."""
    return ((other.left.mT @ one.left) * (other.right @ one.right.mT)).sum((-1, -2))


@torch.no_grad()
def canonical(codes: Codes) -> Codes:
    """The same changes in the one gauge that codes are stored in.

    Columns of left and rows of right come from the singular value decomposition of their product, both of size √σ,
    largest σ first, and the entry of largest size in each column of left is positive.
    """
    (q_left, r_left), (q_right, r_right) = (torch.linalg.qr(x.double()) for x in (codes.left, codes.right.mT))
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.mT)
    root = sigma.clamp_min(0).sqrt()
    left, right = q_left @ u * root[..., None, :], root[..., None] * (vt @ q_right.mT)
    largest = left.gather(-2, left.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(left)
    return Codes((left * sign).to(codes.left), (right * sign.mT).to(codes.right))


# ------------------------------------------------------------------------------------------------- on a model


class _Holder(nn.Module):
    """Lets `functional_call` run any function of a model with other tensors in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], T]) -> T:
        return function(self.model)


def calling(adapter: Adapter, codes: Codes, function: Callable[[nn.Module], T], layout: Layout | None = None) -> T:
    """`function(model)` as if the adapter had these codes, one person per sample; gradients reach the codes.

    Every batch inside `function` has the N of the codes. The adapter's own numbers stay as they are.
    """
    tensors = unpack(layout or layout_of(adapter), codes)
    names = {id(parameter): name for name, parameter in adapter.model.named_parameters()}
    found = {f"model.{names[id(own)]}": tensors[key] for key, own in adapter.named_parameters()}
    return cast(T, functional_call(_Holder(adapter.model), found, (function,)))


def put(adapter: Adapter, codes: Codes) -> None:
    """Copy one person's codes (1, L, …) into the adapter.

    Raises:
        ConvloraError: they are of another number of people, or of other layers.
    """
    layout = layout_of(adapter)
    if tuple(codes.left.shape) != (1, len(layout.layers), layout.b, layout.rank):
        raise ConvloraError(
            f"an adapter holds one person's codes (1, {len(layout.layers)}, {layout.b}, {layout.rank}), not "
            f"{tuple(codes.left.shape)}"
        )
    tensors = unpack(layout, codes)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            parameter.copy_(tensors[key][0])
