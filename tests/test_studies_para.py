"""PaRa's studies: sizes are as told, a schedule is kept through a kill, and each study runs on a small cohort."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_generator, tiny_photos

import convlora
from convlora import cli
from convlora.attach import base_modules
from convlora.errors import ConvloraError
from convlora.integrations.eg3d import lab
from convlora.integrations.eg3d.anchors import find_anchors
from convlora.integrations.eg3d.checkpoint import load_generator
from convlora.integrations.eg3d.personalize import parameter_groups, tune
from convlora.integrations.eg3d.pipeline import Settings
from convlora.integrations.eg3d.studies import Cohort
from convlora.integrations.eg3d.studies.cohort import PRETRAINED, RATES, Kind, inject_kind, trainables
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.pairs import _before, _models, _Pair, overlap
from convlora.integrations.eg3d.studies.run import run_studies
from convlora.layers import as_matrix
from convlora.methods.para import orthonormal

QUICK = Settings(anchor_steps=1, steps=1, batch_size=1)
TOY = Effort(views=1, samples=4, pairs=1, latent_steps=1, photos=1, ranks=(1, 2))


@pytest.fixture(scope="module")
def base():
    return load_generator("lab").requires_grad_(False)


@pytest.mark.parametrize("rank", [1, 4])
def test_para_with_the_numbers_of_lora_trains_no_more_and_hardly_less(base, rank) -> None:
    kind = Kind("para", rank, numbers_of="lora")
    assert kind.label == f"PaRa rank {rank} with the numbers of LoRA"
    adapter = inject_kind(base, kind)
    ranks, outs = {}, {}
    for layer, change in adapter.layers.items():
        outs[layer], ranks[layer] = change.B.shape
    count = adapter.num_trainable
    adapter.remove()
    assert all(rank <= ranks[layer] < outs[layer] for layer in ranks)
    wanted = trainables(base, Kind(rank=rank))
    decoder = sum(p.numel() for p in base.decoder.parameters())
    assert count == decoder + sum(ranks[layer] * outs[layer] for layer in ranks)  # PaRa's is r·out on every layer
    assert 0 <= wanted - count < max(outs.values())  # not even the largest layer could have one more
    assert not convlora.Adapter.names(base)


def test_ranks_above_what_a_layer_can_have_are_lowered_there(base) -> None:
    for method, limit in (("lora", lambda out, cols: min(out, cols)), ("para", lambda out, cols: min(out - 1, cols))):
        adapter = inject_kind(base, Kind(method, 64))
        ranks = {layer: change.B.shape[1] for layer, change in adapter.layers.items()}
        adapter.remove()
        rows = {row.name: row.matrix for row in convlora.adaptable(base)}
        assert ranks == {layer: min(64, limit(*rows[layer])) for layer in ranks} and 64 in ranks.values()


def test_lora_and_deft_train_as_many_numbers_at_every_rank(base) -> None:
    for rank in (1, 4, 16):
        assert trainables(base, Kind("deft", rank)) == trainables(base, Kind("lora", rank))


def test_a_method_s_schedule_is_advanced_and_survives_a_kill(tmp_path) -> None:
    G, photos = tiny_generator(), tiny_photos(3)
    anchors = find_anchors(G, photos, 2, progress=False)

    def run(file, stop: int | None = None):
        model = copy.deepcopy(G)
        torch.manual_seed(0)
        adapter = inject_kind(model, Kind("para"), steps=250)  # its removal sets in over 25 steps
        calls = 0

        def perceptual(a, b):
            nonlocal calls
            calls += 1
            if stop is not None and calls > 2 * stop:
                raise KeyboardInterrupt
            return (a - b).abs().mean((1, 2, 3))

        groups = parameter_groups(adapter, 0.004, 0.001)
        try:
            tune(model, photos, anchors, groups, steps=20, batch_size=2, perceptual=perceptual, adapter=adapter,
                 checkpoint=file, checkpoint_seconds=0, progress=False)  # fmt: skip
        except KeyboardInterrupt:
            return None
        return adapter.state_dict()

    whole = run(tmp_path / "whole.ckpt")
    warmth = [float(value) for key, value in whole.items() if key.endswith("warmth")]
    assert warmth and warmth == pytest.approx([20 / 25] * len(warmth))
    assert run(tmp_path / "run.ckpt", stop=14) is None  # a checkpoint was written at step 10
    resumed = run(tmp_path / "run.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_overlap_counts_shared_directions() -> None:
    eye = torch.eye(64, dtype=torch.float64)
    assert overlap(eye[:, :4], eye[:, 2:6]) == pytest.approx(0.5)
    assert overlap(eye[:, :2], eye[:, :8]) == pytest.approx(1.0)  # the fewer all lie in the more
    generator = torch.Generator().manual_seed(0)
    pairs = [[orthonormal(torch.randn(64, 4, generator=generator)) for _ in range(2)] for _ in range(200)]
    mean = sum(overlap(*pair) for pair in pairs) / 200
    assert mean == pytest.approx(4 / 64, rel=0.1)  # the standard error is about 3 %


@pytest.fixture(scope="module")
def albums(tmp_path_factory):
    folder = tmp_path_factory.mktemp("albums")
    return tuple(
        lab.write_album(lab.Person(name, seed), folder / name, 3, 1) for name, seed in (("Ann", 1), ("Ben", 2))
    )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, albums):
    return Cohort(tmp_path_factory.mktemp("studies"), 2, 1, 3, 3, 1, QUICK, progress=False, albums=albums)


def test_methods_at_equal_rank_and_at_equal_numbers(cohort) -> None:
    [found] = run_studies(["P1"], replace(cohort, only=0), TOY)
    assert found.models() == [
        "pretrained", "LoRA rank 1", "LoRA rank 2", "PaRa rank 1", "PaRa rank 2",
        "PaRa rank 1 with the numbers of LoRA", "PaRa rank 2 with the numbers of LoRA", "DEFT rank 1", "DEFT rank 2",
    ]  # fmt: skip
    finite(found)
    assert set(RATES) == {"para", "deft"} and found.verdicts().count("\n") + 1 == len(found.claims)
    size = trainables(cohort.base, Kind("para"))
    assert f"PaRa rank 1 {size:,}," in found.notes[0]


def test_one_photo_s_models_are_looked_at_around_it(cohort) -> None:
    [found] = run_studies(["P2"], replace(cohort, only=0), replace(TOY, samples=2))
    assert found.models() == [
        "pretrained", *(f"{name} rank {rank}, 1 photo" for name in ("PaRa", "LoRA") for rank in (1, 2, 8))
    ]  # fmt: skip
    finite(found)
    ann = [value for value in found.values if value.person == "Ann" and value.model == PRETRAINED.label]
    count = {metric: sum(value.metric == metric for value in ann) for metric in found.metrics}
    assert count == dict.fromkeys(count, 1) | {"closeness": 2} | {
        f"{what} {place}": 1 for what in ("spread", "variance") for place in ("hull", "prior")
    }
    mean = {metric: found.interval(PRETRAINED.label, metric).mean for metric in found.metrics}
    assert mean["variance prior"] > mean["variance hull"] > 0 and mean["spread prior"] > mean["spread hull"] > 0


def test_two_people_in_one_generator(cohort) -> None:
    [part] = run_studies(["P3"], replace(cohort, only=1), TOY)  # a worker learns its own person and measures nothing
    assert not part.values and not list(cohort.out.glob("*/seed_0/values/P3.json"))
    assert (cohort.out / "Ben" / "seed_0" / "PaRa_rank_2.safetensors").is_file()
    [found] = run_studies(["P3"], cohort, TOY)
    assert {value.person for value in found.values} == {"Ann", "Ben"}
    finite(found)
    assert found.interval("own first against own last", "order").low >= 0
    both, random = (found.interval(f"{name} directions", "overlap").mean for name in ("both people's", "random"))
    assert 0 < random < both <= 1 + 1e-6  # one step from the common start, which the overlap of 1 remembers


def test_each_way_to_combine_removes_what_its_name_says(cohort) -> None:
    own, before = cohort.subjects
    assert _before(cohort, own).name == before.name and _before(cohort, before).name == own.name
    models = _models(cohort, _Pair(own, before), 2)
    layer = "backbone.synthesis.b8.conv1"
    removed = {
        whose: orthonormal(convlora.Adapter.of(cohort.model(one, Kind("para", 2))).layers[layer].B)
        for whose, one in (("own", own), ("other", before))
    }

    def left(label: str, whose: str) -> float:
        """The share of the weight that is left in a person's removed directions, next to what was there."""
        weights = [
            as_matrix(dict(base_modules(model))[layer].weight, dict(base_modules(model))[layer])
            for model in (models[label], cohort.base)
        ]
        norms = [float((removed[whose].mT @ weight.detach()).norm()) for weight in weights]
        return norms[0] / norms[1]

    assert left("own PaRa alone", "own") < 1e-5 < left("own PaRa alone", "other")
    for whose in ("own", "other"):
        assert left("PaRa union", whose) < 1e-5 < left("PaRa sum", whose)
    assert left("PaRa sequential, own last", "own") < 1e-5 < left("PaRa sequential, own last", "other")
    assert left("PaRa sequential, own first", "other") < 1e-5 < left("PaRa sequential, own first", "own")


def test_two_people_are_needed_to_combine(tmp_path, albums) -> None:
    alone = Cohort(tmp_path, 1, 1, 2, 3, 1, QUICK, progress=False, albums=albums[:1])
    with pytest.raises(ConvloraError, match="P3 combines the adapters of two people and there is one: identities=2"):
        run_studies(["P3"], alone, TOY)


def finite(found) -> None:
    for metric in found.metrics:
        assert any(found.has(model, metric) for model in found.models())
    assert found.values and all(math.isfinite(value.value) for value in found.values)


SMALL = (
    "--identities 2 --seeds 1 --photos 3 --largest 3 --tests 2 --steps 3 --ranks 1,2,4 --views 2 --samples 8 --pairs 2 "
    "--latent-steps 2 --enhanced 1 --quiet --jobs 2"
).split()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_three_run_by_the_command_line_side_by_side(tmp_path, capsys) -> None:
    assert cli.main(["eg3d", "study", "P1", "P2", "P3", "--out", str(tmp_path / "out"), *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [study["study"] for study in found["studies"]] == ["P1", "P2", "P3"]
    for study in found["studies"]:
        assert study["people"] == 2 and study["claims"]
        assert all(math.isfinite(one["mean"]) for summary in study["summary"].values() for one in summary.values())
        assert (tmp_path / "out" / f"{study['study']}_pictures.webp").is_file()
