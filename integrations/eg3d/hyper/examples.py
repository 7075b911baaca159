"""What a hypernetwork learns from: photos of many people with their latents, and what the generator makes of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from convlora import Adapter
from convlora.errors import ConvloraError
from convlora.integrations.eg3d.album import Photos
from convlora.integrations.eg3d.generator import TriPlaneGenerator
from convlora.integrations.eg3d.hyper.codes import Codes, Layout, calling
from convlora.integrations.eg3d.images import to_uint8
from convlora.integrations.eg3d.losses import reconstruct
from convlora.integrations.eg3d.renderer import Samples


class Draw(Protocol):
    """How a generator's pictures come from latents w (N, w_dim) and cameras labels (N, 25), with the adapter's numbers
    or, if given, with codes of N people: images (N, 3, R, R) by name, "image" among them."""

    def __call__(
        self, adapter: Adapter | None, model: nn.Module, w: Tensor, labels: Tensor, codes: Codes | None = None,
        layout: Layout | None = None,
    ) -> dict[str, Tensor]: ...  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """N photos images (N, 3, R, R) uint8, labels (N, 25), latents w (N, w_dim) that explain them, and drawn
    (N, 3, R, R) uint8, what the generator makes of those without an adapter. `person` (N,) numbers the people.

    masks (N, 1, R, R) uint8: 0 where a photo was padded. turned (N, 3, R, R) uint8 and turned_labels (N, 25): the very
    moments from other cameras, which only a drawn world knows.
    """

    images: Tensor
    labels: Tensor
    w: Tensor
    drawn: Tensor
    person: Tensor
    names: list[str]
    masks: Tensor | None = None
    turned: Tensor | None = None
    turned_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, which: Tensor) -> Examples:
        """Some of them."""
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {name: value[which] for name, value in found.items() if isinstance(value, Tensor)}
        return Examples(**{**found, "names": [self.names[i] for i in which.tolist()]})

    def joined(self, more: Examples) -> Examples:
        """These and others, who are other people."""
        found: dict[str, Any] = {}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(more, f.name)
            if (a is None) != (b is None):
                raise ConvloraError(f"examples with and without {f.name} cannot be joined")
            found[f.name] = a + b if f.name == "names" else None if a is None else torch.cat([a, b])
        found["person"] = torch.cat([self.person, more.person + int(self.person.max()) + 1])
        return Examples(**found)

    def to(self, device: torch.device | str) -> Examples:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)}
        return Examples(**found)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What a hypernetwork is given: photos and residuals (N, 3, R, R), without what a photo was padded with."""
        photo, drawn = shown(self.images), shown(self.drawn)
        if self.masks is not None:
            photo = torch.where(self.masks > 0, photo, drawn)
        return photo, photo - drawn

    def draw_people(self, count: int, generator: torch.Generator, among: int | None = None) -> Tensor:
        """Indices (≤ count,) of photos of different people, all equally likely; of the first `among` photos alone."""
        people, inverse = self.person[:among].cpu().unique(return_inverse=True)
        order = torch.randperm(len(inverse), generator=generator)
        # the first photo of each person in a random order of all, then a random order of the people
        first = torch.full((len(people),), len(order)).scatter_reduce(
            0, inverse[order], torch.arange(len(order)), "amin"
        )
        chosen = order[first]
        return chosen[torch.randperm(len(people), generator=generator)[:count]]


def shown(pixels: Tensor) -> Tensor:
    """uint8 pictures as a network sees them, float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def render(
    adapter: Adapter | None, model: nn.Module, w: Tensor, labels: Tensor, codes: Codes | None = None,
    layout: Layout | None = None, samples: Samples | None = None, deterministic: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """`Draw` for EG3D: image and image_raw, with the checkpoint's constant noise."""

    def draw(G: nn.Module) -> dict[str, Tensor]:
        assert isinstance(G, TriPlaneGenerator)
        out = reconstruct(G, w, labels, samples=samples, deterministic=deterministic)
        return {name: out[name] for name in ("image_raw", "image")}

    return draw(model) if codes is None or adapter is None else calling(adapter, codes, draw, layout)


def render_stylegan2(
    adapter: Adapter | None, model: nn.Module, w: Tensor, labels: Tensor, codes: Codes | None = None,
    layout: Layout | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """`Draw` for `stylegan2.Generator`, whose pictures have no cameras: labels are not looked at."""

    def draw(G: Any) -> dict[str, Tensor]:
        return {"image": G.synthesis(w[:, None].expand(-1, G.num_ws, -1), noise_mode="const")}

    return draw(model) if codes is None or adapter is None else calling(adapter, codes, draw, layout)


@torch.no_grad()
def make_examples(
    model: nn.Module,
    photos: Photos,
    w: Tensor,
    person: Tensor | Sequence[int] | None = None,
    *,
    turned: Tensor | None = None,
    turned_labels: Tensor | None = None,
    draw: Callable[..., dict[str, Tensor]] = render,
    batch_size: int = 4,
) -> Examples:
    """Examples of photos and their latents w (N, w_dim); `person` numbers the people, None: all are different.

    turned (N, 3, R, R) in [-1, 1]: the same moments from cameras turned_labels (N, 25), where they are known.

    Raises:
        ConvloraError: numbers of photos and of what belongs to them differ.
    """
    count = len(photos)
    people = torch.arange(count) if person is None else torch.as_tensor(person)
    for name, value in (("w", w), ("person", people), ("turned", turned), ("turned_labels", turned_labels)):
        if value is not None and len(value) != count:
            raise ConvloraError(f"{count} photos need {count} rows of {name}, not {len(value)}")
    device = next(model.parameters()).device
    more: dict[str, Any] = {"deterministic": True} if draw is render else {}
    drawn = [
        to_uint8(draw(None, model, x.to(device), c.to(device), **more)["image"])
        for x, c in zip(w.split(batch_size), photos.labels.split(batch_size))
    ]
    masks = None if photos.masks is None else (photos.masks * 255).round().byte()
    return Examples(
        to_uint8(photos.images), photos.labels, w.cpu(), torch.cat(drawn), people, list(photos.names), masks,
        None if turned is None else to_uint8(turned), turned_labels,
    )  # fmt: skip
