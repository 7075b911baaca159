"""Study H1: what the hypernetwork's paper claims, on one drawn person at toy effort."""

from __future__ import annotations

import pytest

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.hyper import HyperNetwork
from convlora.integrations.eg3d.lab.hyper import ENCODER, encoder
from convlora.integrations.eg3d.pipeline import Settings
from convlora.integrations.eg3d.studies import COMPANIONS, Cohort
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.instant import from_one_photo, ways


def test_the_study_measures_every_way_and_the_truth(tmp_path) -> None:
    settings = Settings(anchor_steps=2)
    cohort = Cohort(tmp_path, 1, photos=2, largest=2, tests=2, settings=settings, progress=False)
    G = cohort.base
    HyperNetwork.for_generator(
        G, dim=16, heads=2, depth=0, decoder_depth=1, encoder=encoder(), encoder_name=ENCODER
    ).save(tmp_path / "hypernetwork.safetensors")
    effort = Effort(views=2, photos=1)
    found = from_one_photo(cohort, effort, fast=1, slow=2)
    assert COMPANIONS["H1"] is from_one_photo
    labels = ["pretrained", *ways(1, 2)]
    assert found.models() == labels and len(labels) == 6
    for label in labels:
        for metric in found.metrics:
            assert found.has(label, metric) == (label != "pretrained" or metric != "seconds")
    verdicts = [found.verdict(claim)[0] for claim in found.claims]
    assert len(verdicts) == 8 and "Face Rec. .655" in found.table()
    assert (tmp_path / "H1_pictures.webp").stat().st_size > 1000
    again = from_one_photo(cohort, effort, fast=1, slow=2)
    assert again.values == found.values


def test_other_generators_bring_their_own_hypernetwork(tmp_path) -> None:
    cohort = Cohort(tmp_path, 1, photos=2, largest=2, tests=1, progress=False, generator="lab-cats")
    with pytest.raises(ConvloraError, match="H1 needs a hypernetwork for lab-cats at .*hypernetwork.safetensors"):
        from_one_photo(cohort, Effort(), fast=1, slow=2)
