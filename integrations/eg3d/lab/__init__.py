"""A laboratory without photographs: procedural people and cats with known truth, and networks trained on them alone."""

from __future__ import annotations

from convlora.integrations.eg3d.lab import networks
from convlora.integrations.eg3d.lab._species import CATS, PEOPLE, SPECIES, Species, species
from convlora.integrations.eg3d.lab.encoder import w_encoder
from convlora.integrations.eg3d.lab.people import (
    EVAL_SEEDS,
    PERSON_A,
    Person,
    evaluation_people,
    photos,
    write_album,
)
from convlora.integrations.eg3d.lab.world import (
    anchors3d,
    attributes,
    landmarks,
    render,
    sample_identity,
    sample_nuisance,
    sample_traits,
    sdf,
    trace,
    z_from_params,
)

__all__ = [
    "CATS", "EVAL_SEEDS", "PEOPLE", "PERSON_A", "Person", "SPECIES", "Species", "anchors3d", "attributes",
    "evaluation_people", "landmarks", "networks", "photos", "render", "sample_identity", "sample_nuisance",
    "sample_traits", "sdf", "species", "trace", "w_encoder", "write_album", "z_from_params",
]  # fmt: skip
