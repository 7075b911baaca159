"""Block-wise LoRA: masks part the generator, mixtures are what their weights say, B1 and B2 measure and resume."""

from __future__ import annotations

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny import TINY, tiny_generator

import convlora
from convlora import Adapter, cli, files
from convlora.errors import ConvloraError
from convlora.integrations import eg3d
from convlora.integrations.eg3d import lab
from convlora.integrations.eg3d.blocks import (
    FULL_MASK,
    GROUPS,
    group_globs,
    mask_name,
    masked_ranks,
    masked_weights,
    masks,
    rest,
)
from convlora.integrations.eg3d.personalize import TARGETS
from convlora.integrations.eg3d.pipeline import Settings
from convlora.integrations.eg3d.studies import ALL, Cohort
from convlora.integrations.eg3d.studies import blockwise as b
from convlora.integrations.eg3d.studies.cohort import LORA
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.heat import heat_map
from convlora.integrations.eg3d.studies.mixtures import mixed
from convlora.integrations.eg3d.studies.page import DRAWN, write_page
from convlora.integrations.eg3d.studies.results import Results
from convlora.integrations.eg3d.studies.styles import CHOSEN, Styles, both
from convlora.integrations.eg3d.tasks import novel_views

QUICK = Settings(anchor_steps=1, steps=1, batch_size=2)
EFFORT = Effort(views=1, photos=1)


def cohort_in(folder) -> Cohort:
    """One person, hardly learnt, rendered from a 16th of the rays."""
    cohort = Cohort(folder, 1, 1, 2, 2, 1, QUICK, progress=False)
    cohort.base.neural_rendering_resolution = 16
    return cohort


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["lab", "ffhq512-128"])
def test_every_layer_that_is_adapted_is_in_one_group(name) -> None:
    with torch.device("meta"):
        G = eg3d.TriPlaneGenerator(**eg3d.CONFIGS[name])
    found = {
        group: [row.name for row in convlora.adaptable(G, globs)] for group, globs in group_globs(G).items() if globs
    }
    listed = [layer for layers in found.values() for layer in layers]
    assert sorted(listed) == sorted(row.name for row in convlora.adaptable(G, list(TARGETS)))
    assert len(listed) == len(set(listed)) and list(found) == list(GROUPS)
    resolutions = {layer.split(".")[2] for layer in found["coarse"] + found["middle"]}
    assert resolutions == {"b4", "b8", "b16", "b32"}


def test_masks_are_named_in_order_and_unknown_groups_refused() -> None:
    found = list(masks())
    assert len(found) == len(set(found)) == 16 and found[0] == () and found[-1] == FULL_MASK
    assert len({mask_name(mask) for mask in found}) == 16
    assert all({*mask, *rest(mask)} == set(GROUPS) and not {*mask} & {*rest(mask)} for mask in found)
    assert rest(["sr", "coarse"]) == ("middle", "fine") and mask_name(["sr", "coarse"]) == "coarse+sr"
    with pytest.raises(ConvloraError, match="no group of blocks low; there are coarse, middle, fine, sr"):
        masked_weights(tiny_generator(), ("fine", "low"))


def test_both_scores_are_needed() -> None:
    assert both(0.5, 0.5) == 0.5 and both(0.9, 0.1) == pytest.approx(0.18) and both(0.9, -0.1) == both(0.0, 0.9) == 0
    scores = {
        b.Mix(FULL_MASK, ()): (1.0, 1.0), b.BOTH_FULL: (0.4, 0.8), b.Mix(FULL_MASK, ("fine",)): (0.6, 0.6),
    }  # fmt: skip
    assert b.best(scores) == b.Mix(FULL_MASK, ("fine",))  # the first has no style in it


def test_statistics_are_means_and_deviations_of_channels() -> None:
    features = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    found = b.channel_statistics(features).numpy()
    flat = features.numpy().reshape(2, 3, 20)
    np.testing.assert_allclose(found, np.concatenate([flat.mean(2), flat.std(2)], 1), rtol=1e-12)
    moved = features * 2 + 1
    expected = np.linalg.norm(b.channel_statistics(moved).numpy() - found, axis=1) / np.linalg.norm(found, axis=1)
    apart = b.channel_statistics_distance(b.channel_statistics(moved), torch.from_numpy(found))
    np.testing.assert_allclose(apart.numpy(), expected, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------------ mixtures


@pytest.fixture(scope="module")
def on_one() -> eg3d.TriPlaneGenerator:
    """A small generator with the four adapters that mixtures are made of, all with something learnt, disabled."""
    torch.manual_seed(3)
    G = eg3d.TriPlaneGenerator(**{**TINY, "plane_resolution": 64}).eval().requires_grad_(False)
    blocks, style_mask = masked_ranks(G, b.IDENTITY_BLOCKS), masked_ranks(G, ("fine",))
    for name, ranks in (
        ("default", {}), ("identity_coarse_middle", blocks), ("style", {}), ("style_fine", style_mask),
    ):  # fmt: skip
        train = () if name.startswith("style") else ["decoder"]
        adapter = convlora.inject_lora(G, 1, targets=list(TARGETS), ranks=ranks, train=train, name=name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        adapter.disable()
    return G.requires_grad_(False)


def _group(layer: str) -> str:
    if layer.startswith("superresolution"):
        return "sr"
    resolution = int(layer.split(".")[2][1:])
    return "coarse" if resolution <= 8 else "middle" if resolution <= 32 else "fine"


@pytest.mark.parametrize("mask", list(masks())[1:-1])
def test_a_mixture_is_each_adapter_s_change_where_its_mask_says(on_one, mask) -> None:
    identity, style = Adapter.of(on_one, "default"), Adapter.of(on_one, "style")
    for mix in (b.Mix(FULL_MASK, mask), b.Mix(rest(mask), mask)):
        found = mixed(on_one, mix)
        for layer in identity.layers:
            expected = identity.delta(layer) * float(_group(layer) in mix.identity)
            expected = expected + style.delta(layer) * float(_group(layer) in mix.style)
            torch.testing.assert_close(found.delta(layer), expected, atol=1e-5, rtol=1e-4)
        for name, full in found.trained.items():  # the decoder comes with the person
            torch.testing.assert_close(full.value, identity.trained[name].value)
        found.remove()


def test_masking_strengths_renders_what_composing_does(on_one) -> None:
    w, labels = torch.randn(2, on_one.w_dim), eg3d.cameras.random_views(2)
    mix = b.Mix(FULL_MASK, ("fine", "sr"))
    composed = mixed(on_one, mix)
    one = novel_views(on_one, w, labels)
    composed.remove()
    unlike = novel_views(on_one, w, labels)
    G = copy.deepcopy(on_one)
    style = Adapter.of(G, "style")
    style.set_strength(masked_weights(G, mix.style))
    style.enable()
    Adapter.of(G, "default").enable()
    torch.testing.assert_close(novel_views(G, w, labels), one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unlike, one, atol=1e-2)


def test_trained_masks_are_taken_whole_and_missing_ones_are_told(on_one) -> None:
    found = mixed(on_one, b.Mix(b.IDENTITY_BLOCKS, ("fine",), True, True))
    assert {_group(layer) for layer in found.layers} == {"coarse", "middle", "fine"}
    fine = next(layer for layer in found.layers if _group(layer) == "fine")
    torch.testing.assert_close(found.delta(fine), Adapter.of(on_one, "style_fine").delta(fine), atol=1e-6, rtol=1e-4)
    found.remove()
    with pytest.raises(ConvloraError, match="style_sr"):
        mixed(on_one, b.Mix(FULL_MASK, ("sr",), style_trained=True))


def test_the_cosine_of_a_group_is_that_of_its_updates_multiplied_out(on_one) -> None:
    found = b._weights_at_odds(on_one, ("middle", "sr"))
    pairs = []
    for layer in Adapter.of(on_one, "default").layers:
        if _group(layer) in ("middle", "sr"):
            gain = getattr(on_one.get_submodule(layer), "weight_gain", 1.0)
            pairs.append([gain * Adapter.of(on_one, who).delta(layer).double() for who in ("default", "style")])
    one, other = (torch.cat([pair[i].flatten() for pair in pairs]) for i in range(2))
    assert found["cosine"] == pytest.approx(float(one @ other / one.norm() / other.norm()), abs=1e-5)
    assert found["magnitude ratio"] == pytest.approx(float(one.norm() / other.norm()), rel=1e-4)
    assert found["sign disagreement"] == pytest.approx(float((one * other < 0).double().mean()), abs=1e-3)
    assert 0 <= found["row angle"] <= 90 and 0 <= found["column angle"] <= 90
    assert {float(c.strength) for c in Adapter.of(on_one, "style").layers.values()} == {1.0}


def test_there_are_39_mixtures_and_a_claim_is_of_two_that_are_measured() -> None:
    chosen = [("fine", "sr"), ("fine",), ("middle", "fine", "sr")]
    labels = [mix.label for mix in b.mixes(chosen)]
    assert len(labels) == len(set(labels)) == 16 + 3 + 14 + 2 + 3 + 1
    claims = b.claims(labels)
    assert len(claims) == 5 * 3 + 2 and {side for c in claims for side in (c.better, c.worse)} <= set(labels)
    assert "identity full, style fine+sr trained so" in labels and labels[-1].endswith("null space")
    drawn = {label for models in b._rows().values() for label in models.values()}
    assert set(labels[:-1]) <= drawn


# ------------------------------------------------------------------------------------------------------------- studies


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """B1's results on one person, and the cohort."""
    folder = tmp_path_factory.mktemp("blockwise")
    cohort = cohort_in(folder / "out")
    with cohort.opened():
        return b.block_wise(cohort, EFFORT), cohort


def test_every_mixture_is_measured_and_drawn(measured, tmp_path) -> None:
    found, cohort = measured
    chosen = Styles(cohort, b.STYLE).chosen(1)
    assert len(chosen) == CHOSEN and all(0 < len(mask) < 4 for mask in chosen)
    labels = {mix.label for mix in b.mixes(chosen)}
    assert labels <= set(found.models()) and all(math.isfinite(value.value) for value in found.values)
    nothing = b.Mix(FULL_MASK, ()).label
    assert found.interval(nothing, "style").mean == found.interval(nothing, "style statistics").mean == 0
    assert {found.verdict(claim)[0] for claim in found.claims} <= {"holds", "does not hold", "undecided"}
    assert (cohort.out / "B1_masks.png").stat().st_size > 10_000
    assert (cohort.out / "B1_pictures.webp").stat().st_size > 5_000
    found.facts = {"data": DRAWN}
    found.write(cohort.out)
    page = write_page([Results.read(cohort.out, "B1")], cohort.out / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 and "means over combinations" in page
    with pytest.raises(ConvloraError, match="study T0 has measured nothing"):
        heat_map(Results("T0", "", {"identity": ""}), b._rows(), tmp_path / "none.png")


def test_what_was_measured_is_not_trained_for_again(measured, tmp_path) -> None:
    found, cohort = measured
    shutil.copytree(cohort.out, tmp_path / "out", ignore=shutil.ignore_patterns("styles", "*.safetensors"))
    again = b.block_wise(cohort_in(tmp_path / "out"), EFFORT)
    assert again.values == found.values and again.claims == found.claims and again.notes == found.notes
    assert not (tmp_path / "out" / "styles").exists()


def test_the_best_mixture_is_one_file_that_draws_the_same_in_another_load(measured) -> None:
    found, cohort = measured
    subject = cohort.subjects[0]
    path = b.best_file(cohort, subject, "B1")
    _, metadata = files.read(path)
    label = metadata["composition"]
    assert f"is that of '{label}'" in found.notes[-1] and metadata["person"] == subject.name
    chosen = Styles(cohort, b.STYLE).chosen(1)
    mix = next(mix for mix in b.mixes(chosen) if mix.label == label)
    before = b.views(b.loaded(cohort, subject, Styles(cohort, b.STYLE), chosen), mix, cohort, subject, EFFORT)
    G = eg3d.load_generator("lab").requires_grad_(False)
    G.neural_rendering_resolution = 16
    convlora.load_adapter(G, path)
    after = novel_views(G, *b.cameras(cohort, subject, EFFORT))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_a_style_alone_knows_nobody_and_files_of_a_mask_hold_its_blocks(measured) -> None:
    _, cohort = measured
    styles = Styles(cohort, b.STYLE)
    for mask in (FULL_MASK, *styles.chosen(1)):
        tensors, metadata = files.read(styles.adapter(mask))
        assert {_group(name.split("/")[0]) for name in tensors} == set(mask)
        assert metadata["style"] == "cartoon" and metadata["blocks"] == mask_name(mask) and "person" not in metadata
    rows = json.loads((styles.folder / "cartoon_chosen_1.json").read_text())
    assert len(rows) == 14 and rows == sorted(rows, key=lambda row: -row["both"])


def test_conflicts_are_measured_group_by_group(measured) -> None:
    _, cohort = measured
    found = b.conflicts(cohort, EFFORT)
    assert found.models() == [*GROUPS, "full"]
    assert all(found.has(model, metric) for model in found.models() for metric in found.metrics)
    G = copy.deepcopy(cohort.base)
    identity = Adapter.of(cohort.model(cohort.subjects[0], LORA))
    style = convlora.load_adapter(G, Styles(cohort, b.STYLE).adapter())
    whole = convlora.conflict(identity, style).total
    assert found.interval("full", "cosine").mean == pytest.approx(whole.cosine, abs=1e-9)
    assert found.interval("full", "magnitude ratio").mean == pytest.approx(whole.ratio, rel=1e-9)


def test_photographs_have_no_drawings_to_learn_a_style_from(tmp_path) -> None:
    album = lab.write_album(lab.Person("Ann", 1), tmp_path / "ann", 3, 1, 128)
    cohort = Cohort(tmp_path / "out", 1, 1, 2, 3, 1, QUICK, progress=False, albums=(album,))
    assert {"B1_sketch", "B1_palette", "B2_sketch", "B2_palette"} < set(ALL)
    for study in ("B1", "B2", "B1_sketch"):
        with pytest.raises(ConvloraError, match=f"{study} learns its styles from drawings.*leave the albums away"):
            ALL[study](cohort, EFFORT)
    with pytest.raises(ConvloraError, match="no style 'oil'"):
        Styles(cohort_in(tmp_path / "drawn"), "oil").adapter()


@pytest.mark.slow
def test_the_command_measures_both_studies(tmp_path, capsys) -> None:
    command = ["eg3d", "study", "B1", "B2", "--identities", "1", "--seeds", "1", "--photos", "2", "--largest", "2"]
    command += ["--tests", "1", "--steps", "2", "--enhanced", "1", "--views", "2", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [study["study"] for study in told["studies"]] == ["B1", "B2"]
    page = (tmp_path / "out" / "studies.html").read_text(encoding="utf-8")
    assert "Block-wise LoRA: a person in the style cartoon" in page and "means over combinations" in page
    assert len(list((tmp_path / "out" / "styles").glob("cartoon_*.safetensors"))) == 1 + CHOSEN
    assert not list((tmp_path / "out").rglob("*.ckpt"))
