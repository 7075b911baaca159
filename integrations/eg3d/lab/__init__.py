"""A laboratory without photographs: procedural heads with known truth, and networks trained on them alone."""

from __future__ import annotations

from .people import EVAL_SEEDS, PERSON_A, Person, evaluation_people, photos, write_album
from .world import (
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
    "EVAL_SEEDS", "PERSON_A", "Person", "anchors3d", "attributes", "evaluation_people", "landmarks", "photos",
    "render", "sample_identity", "sample_nuisance", "sample_traits", "sdf", "trace", "write_album", "z_from_params",
]  # fmt: skip
