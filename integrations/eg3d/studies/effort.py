"""How much every study does: the paper's numbers, and smaller ones for two cores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """The defaults are the paper's (My3DGen sections 4.2 to 4.5), where it states them."""

    views: int = 20  # random novel views per latent for ID_sim
    samples: int = 1000  # synthesised images per person
    pairs: int = 10  # of anchors that are interpolated
    weights: int = 10  # points on each line
    latent_steps: int = 600  # of an inversion
    tune_steps: int = 350  # of pivotal tuning
    project_steps: int = 1000  # of a projection into the personal space
    photos: int | None = None  # held-out photos that are enhanced or edited; None: all
    factor: int = 16  # of super-resolution
    directions: int = 10_000  # samples scored for an attribute direction
    ranks: tuple[int, ...] = (1, 4, 16)
    sizes: tuple[int, ...] = (10, 50, 100)


#: What the lab's small generator needs, whose encoder starts close, on two cores.
LAB = Effort(
    views=6, samples=60, pairs=4, weights=5, latent_steps=25, tune_steps=25, project_steps=40, photos=6, factor=4,
    directions=400,
)  # fmt: skip
