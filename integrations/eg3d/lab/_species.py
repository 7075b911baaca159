"""What a species of the lab is: the names of its numbers, how a row of them is drawn, and its generator.

Every species has as many numbers as people have, and light, background and clothes at the same places, so that random
streams, latents and generators fit all of them and one's prior is a start for another's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import numpy as np

from convlora.errors import ConvloraError

from . import _cat_decode, _decode
from ._names import IDENTITY_NAMES, NUISANCE_NAMES, OCCLUDER_TRAITS, TRAIT_NAMES


@dataclass(frozen=True)
class Species:
    """How one kind of head is named, decoded and drawn.

    `habits` are photo numbers that stay close to an individual's own value, with the standard deviation they vary by.
    `sided` numbers change sign in a mirror. `aims` are offsets from each eye (outwards, up, towards the camera) at
    which training looks more often besides eyes, nose and mouth. `generator` is what `load_generator` and
    `choose_networks` take, `individual` what one is called.
    """

    name: str
    individual: str
    generator: str
    identity_names: tuple[str, ...]
    nuisance_names: tuple[str, ...]
    trait_names: tuple[str, ...]
    occluder_traits: tuple[str, ...]
    habits: Mapping[str, float] = field(hash=False)
    sided: tuple[str, ...]
    aims: tuple[tuple[float, float, float], ...]
    consent: str
    decode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    tracer_module: str

    @property
    def param_names(self) -> tuple[str, ...]:
        return self.identity_names + self.nuisance_names

    @property
    def lasting_traits(self) -> tuple[str, ...]:
        return tuple(name for name in self.trait_names if name not in self.occluder_traits)

    def tracer(self) -> ModuleType:
        """The kernels trace_rays, distances and skin_in_front; imported here because they need numba."""
        return import_module(self.tracer_module, __package__)


PEOPLE = Species(
    "people",
    individual="Person",
    generator="lab",
    identity_names=IDENTITY_NAMES,
    nuisance_names=NUISANCE_NAMES,
    trait_names=TRAIT_NAMES,
    occluder_traits=OCCLUDER_TRAITS,
    habits={
        "hair_length": 0.15, "hair_volume": 0.3, "hair_fringe": 0.3, "hair_parting": 0.3, "hair_bun": 0.1, "age": 0.1,
    },
    sided=("gaze_x", "hair_parting", "light_x"),
    aims=((0.0, 0.035, 0.0),),
    consent="A procedural person, drawn from random numbers: no human being is shown and nobody's consent is needed.",
    decode=_decode.decode,
    tracer_module="._tracer",
)  # fmt: skip

CATS = Species(
    "cats",
    individual="Cat",
    generator="lab-cats",
    identity_names=_cat_decode.IDENTITY_NAMES,
    nuisance_names=_cat_decode.NUISANCE_NAMES,
    trait_names=_cat_decode.TRAIT_NAMES,
    occluder_traits=(),
    habits={"fluff": 0.3, "collar_lightness": 0.15, "collar_hue": 0.15},
    sided=("gaze_x", "ear_turn", "light_x"),
    aims=((0.0, 0.045, -0.02), (0.045, 0.15, -0.13)),
    consent="A procedural cat, drawn from random numbers: no animal is shown.",
    decode=_cat_decode.decode,
    tracer_module="._cat_tracer",
)

SPECIES = {kind.name: kind for kind in (PEOPLE, CATS)}


def species(name: str | Species) -> Species:
    """The species of this name, "people" or "cats"; one that is already there is handed back.

    Raises:
        ConvloraError: the lab draws none of this name.
    """
    if isinstance(name, Species):
        return name
    if name not in SPECIES:
        raise ConvloraError(f"the lab draws no {name!r}; its species are {', '.join(SPECIES)}")
    return SPECIES[name]
