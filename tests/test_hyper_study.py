"""Study H1: what the hypernetwork's paper claims, on one drawn person at toy effort."""

from __future__ import annotations

import dataclasses

import pytest

from convlora.errors import ConvloraError
from convlora.integrations.eg3d.hyper import HyperNetwork
from convlora.integrations.eg3d.lab.hyper import ENCODER, encoder
from convlora.integrations.eg3d.pipeline import Settings
from convlora.integrations.eg3d.studies import COMPANIONS, Cohort
from convlora.integrations.eg3d.studies import instant as study
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
    # another hypernetwork, the same file name: nothing measured with the one before is its own
    HyperNetwork.for_generator(
        G, dim=16, heads=2, depth=1, decoder_depth=1, encoder=encoder(), encoder_name=ENCODER
    ).save(tmp_path / "hypernetwork.safetensors")
    found.facts |= {"effort": str(effort), "settings": cohort.record}
    found.write(tmp_path / "before")
    with pytest.raises(ConvloraError, match="holds study H1 of other hypernetwork"):
        from_one_photo(dataclasses.replace(cohort, known=tmp_path / "before"), effort, fast=1, slow=2)
    other = from_one_photo(cohort, effort, fast=1, slow=2)
    alone = lambda results: results.interval("hypernetwork only", "PSNR").mean  # noqa: E731
    assert alone(other) != alone(found)


def test_a_long_tuning_is_measured_on_its_way(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study, "MARKS", (10, 20))
    cohort = Cohort(tmp_path, 1, photos=2, largest=2, tests=2, settings=Settings(anchor_steps=2), progress=False)
    cohort.base.neural_rendering_resolution = 16
    found = from_one_photo(cohort, Effort(views=1, photos=1), fast=1, slow=20)
    models = found.models()
    assert [m for m in models if "after" in m] == ["LoRA rank 4, 20 steps, after 10"]
    early, late = (found.interval(m, "perceptual").mean for m in ("LoRA rank 4, 20 steps, after 10", models[-1]))
    assert late < early < found.interval("pretrained", "perceptual").mean
    assert len(found.claims) == 10 and all(found.verdict(claim) for claim in found.claims)


def test_other_generators_bring_their_own_hypernetwork(tmp_path) -> None:
    cohort = Cohort(tmp_path, 1, photos=2, largest=2, tests=1, progress=False, generator="lab-cats")
    with pytest.raises(ConvloraError, match="H1 needs a hypernetwork for lab-cats at .*hypernetwork.safetensors"):
        from_one_photo(cohort, Effort(), fast=1, slow=2)
