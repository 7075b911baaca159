"""Studies: values become intervals and verdicts, and every study runs on a small cohort and resumes."""

from __future__ import annotations

import csv
import json
import math
import shutil
from html import escape

import numpy as np
import pytest
import torch

from convlora import cli
from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d import lab
from convlora.integrations.eg3d.metrics.checkerboard import checkerboard
from convlora.integrations.eg3d.pipeline import Settings
from convlora.integrations.eg3d.studies import STUDIES, Cohort
from convlora.integrations.eg3d.studies.cohort import Subject
from convlora.integrations.eg3d.studies.effort import Effort
from convlora.integrations.eg3d.studies.page import DRAWN, write_page
from convlora.integrations.eg3d.studies.results import Claim, Results
from convlora.integrations.eg3d.studies.run import run_studies


def results(gap: float, people: int = 8) -> Results:
    """Two models whose scores differ by `gap` on the same photos."""
    random = np.random.default_rng(0)
    claims = [Claim("B is better than A", "score", "B", "A"), Claim("A is about as good", "score", "A", "B", -1.0)]
    found = Results("T0", "A study", {"score": "higher is better"}, claims, {"A": {"score": ".5"}})
    for person in range(people):
        shared = random.normal(person, 3, 6)
        for model, shift in (("A", 0.0), ("B", gap)):
            noise = random.normal(0, 0.2, 6)
            found.add(model, "score", f"P{person}", 0, dict(zip("abcdef", shared + noise + shift)))
    return found


@pytest.mark.parametrize(
    ("gap", "verdicts"),
    [(0.5, ["holds", "holds"]), (-0.5, ["does not hold", "holds"]), (0.0, ["undecided", "holds"]),
     (2.0, ["holds", "does not hold"])],
)  # fmt: skip
def test_claims_are_judged_by_the_whole_interval(gap, verdicts) -> None:
    found = results(gap)
    assert [found.verdict(claim)[0] for claim in found.claims] == verdicts


def test_lower_is_better_turns_the_comparison_round() -> None:
    found = results(0.5)
    assert found.verdict(Claim("A is lower", "score", "A", "B", lower_is_better=True))[0] == "holds"


def test_only_shared_photos_are_compared_and_missing_ones_do_not_count() -> None:
    found = results(0.5)
    found.add("B", "score", "P0", 0, {"only B": 1e6, "nan": math.nan})
    assert found.difference("B", "A", "score").high < 1
    with pytest.raises(ConvloraError, match="no values of 'score' for 'C'"):
        found.interval("C", "score")
    with pytest.raises(ConvloraError, match="no metric 'other'"):
        found.add("A", "other", "P0", 0, {})


def test_everything_is_written_and_read_again(tmp_path) -> None:
    found = results(0.5)
    data, table, plot = found.write(tmp_path)
    assert plot.stat().st_size > 2000
    assert json.loads(data.read_text())["claims"][0]["verdict"] == "holds"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 96 and float(rows[0]["value"]) == found.values[0].value
    assert "(paper .5)" in found.table() and "holds: B is better than A" in found.verdicts()
    found.facts = {"command": "<script>", "data": DRAWN}
    found.write(tmp_path)
    again = Results.read(tmp_path, "T0")
    assert again == found
    page = write_page([again], tmp_path / "page.html").read_text()
    assert escape(DRAWN) in page and "✓ holds" in page and "paper .5" in page and "<script>" not in page
    assert "data:image/png;base64," in page
    (tmp_path / "T0.csv").write_text("model,metric\n1,2\n")
    with pytest.raises(FileError, match="no readable results of study T0"):
        Results.read(tmp_path, "T0")


def test_values_over_an_axis_become_curves(tmp_path) -> None:
    found = Results("F0", "A curve", {"score": "higher is better"}, axis="weight")
    for person in range(3):
        for weight in (0.0, 0.5, 1.0):
            found.add("A", "score", f"P{person}", 0, {f"pair 0, weight {weight:.2f}": weight + person})
    assert found.write(tmp_path)[-1].stat().st_size > 2000


def test_checkerboards_are_told_from_noise_and_from_shapes() -> None:
    x = torch.arange(128)
    board = ((x[:, None] + x) % 4 < 2).float().expand(1, 3, -1, -1)
    stripes = (x % 8 < 4).float().expand(1, 3, 128, -1)
    noise = torch.randn(1, 3, 128, 128)
    blob = torch.exp(-((x[:, None] - 64.0) ** 2 + (x - 64.0) ** 2) / 800).expand(1, 3, -1, -1)
    zero = torch.zeros(1, 3, 128, 128)
    scores = [float(checkerboard(image, zero)) for image in (board, stripes, noise, blob + 0.01 * noise)]
    assert scores[0] > 0.5 and scores[1] > 0.5 and scores[2] < 0.15 and scores[3] < 0.15
    with pytest.raises(ConvloraError, match="R ≥ 32"):
        checkerboard(zero[..., :8, :8], zero[..., :8, :8])


def test_what_was_measured_of_a_person_is_kept_unless_the_effort_differs(tmp_path, monkeypatch) -> None:
    people = [Subject(name, 0, None, None, torch.empty(0)) for name in ("A B", "C")]  # type: ignore[arg-type]
    monkeypatch.setattr(Cohort, "subjects", people)
    cohort = Cohort(tmp_path, 2, 1)

    def measure(effort: Effort, stop_at: str = "") -> tuple[list[str], Results]:
        found, asked = Results("T0", "A study", {"score": "higher is better"}), []
        for subject in cohort.measuring(found, effort):
            asked.append(subject.name)
            if subject.name == stop_at:
                raise KeyboardInterrupt
            found.add("A", "score", *subject.who, {"a": len(asked) / 10})
        return asked, found

    with pytest.raises(KeyboardInterrupt):
        measure(Effort(), stop_at="C")
    asked, first = measure(Effort())
    assert asked == ["C"] and [value.person for value in first.values] == ["A B", "C"]
    asked, second = measure(Effort())
    assert asked == [] and second.values == first.values
    assert measure(Effort(views=3))[0] == ["A B", "C"]


def test_people_in_published_results_are_not_measured_again_unless_settings_differ(tmp_path, monkeypatch) -> None:
    people = [Subject(name, 0, None, None, torch.empty(0)) for name in ("A B", "C")]  # type: ignore[arg-type]
    monkeypatch.setattr(Cohort, "subjects", people)
    before = Results("T0", "A study", {"score": "higher is better"})
    before.add("A", "score", "A B", 0, {"a": 0.25})
    before.facts = {
        "data": DRAWN, "effort": str(Effort()), "settings": Cohort(tmp_path).record,
        "command": "convlora eg3d study T0",
    }  # fmt: skip
    before.write(tmp_path / "published")
    found_by: list[Results] = []

    def measured(**settings) -> tuple[list[str], list[float]]:
        cohort = Cohort(tmp_path / "out", 2, 1, known=tmp_path / "published", **settings)
        found, asked = Results("T0", "A study", {"score": "higher is better"}), []
        for subject in cohort.measuring(found, Effort()):
            asked.append(subject.name)
            found.add("A", "score", *subject.who, {"a": 0.5})
        found_by.append(found)
        return asked, [value.value for value in found.values]

    assert measured() == (["C"], [0.25, 0.5])
    assert measured() == ([], [0.25, 0.5])
    monkeypatch.setattr(Cohort, "subjects", people[1:])
    assert measured() == ([], [0.5, 0.25]), "who is known counts, asked for or not"
    assert found_by[-1].json()["facts"]["extends"] == {"command": "convlora eg3d study T0"}
    with pytest.raises(ConvloraError, match="holds study T0 of other settings: {'photos': 50}, not {'photos': 7}"):
        measured(photos=7)


def test_cohorts_and_names_that_cannot_be_are_refused(tmp_path, capsys) -> None:
    with pytest.raises(ConvloraError, match="largest=3"):
        Cohort(tmp_path, photos=4, largest=3)
    assert cli.main(["eg3d", "study", "T9", "--out", str(tmp_path / "x")]) == 2
    assert "no study T9; there are T1, T2" in capsys.readouterr().err
    assert cli.main(["eg3d", "study", "T1", "--generator", "mine.safetensors", "--out", str(tmp_path / "x")]) == 2
    assert "no drawn people for mine.safetensors" in capsys.readouterr().err
    assert cli.main(["eg3d", "study", "T4", "--score", "nowhere:f", "--out", str(tmp_path / "x")]) == 2
    assert "--score nowhere:f: No module named 'nowhere'" in capsys.readouterr().err
    assert cli.main(["eg3d", "study", "T5", "--ranks", "1,x", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def albums(tmp_path_factory):
    """Two people's albums as a user would bring them."""
    folder = tmp_path_factory.mktemp("albums")
    return tuple(
        lab.write_album(lab.Person(name, seed), folder / name, 3, 1) for name, seed in (("Ann", 1), ("Ben", 2))
    )


QUICK = Settings(anchor_steps=1, steps=1, batch_size=2)


def test_albums_of_photographs_are_studied_without_the_lab_s_truth(tmp_path, albums) -> None:
    cohort = Cohort(tmp_path, 1, 1, 2, 3, 1, QUICK, progress=False, albums=albums[:1])
    [found] = run_studies(["F8"], cohort, Effort(ranks=(1, 2)))
    assert {value.person for value in found.values} == {"Ann"} and list(found.metrics) == ["PSNR"]
    assert found.models() == ["LoRA rank 1", "LoRA rank 2", "full fine-tuning"] and not found.claims
    [again] = run_studies(["F8"], Cohort(tmp_path, 1, 1, 2, 3, 1, QUICK, albums=albums[:1]), Effort(ranks=(1, 2)))
    assert again.values == found.values
    with pytest.raises(ConvloraError, match="other settings|albums"):
        run_studies(["F8"], Cohort(tmp_path, 1, 1, 2, 3, 1, QUICK, albums=albums[1:]), Effort())
    with pytest.raises(ConvloraError, match="no such twins"):
        run_studies(["X1"], cohort, Effort())


def test_albums_that_do_not_suffice_are_refused(tmp_path, albums) -> None:
    with pytest.raises(ConvloraError, match="3 photos to learn from and 1 held out; 4 and at least 1 are needed"):
        list(Cohort(tmp_path, 2, 1, 4, 9, albums=albums).subjects)
    with pytest.raises(ConvloraError, match="theirs are Ann, Ann"):
        list(Cohort(tmp_path, 2, 1, 2, 9, albums=(albums[0], albums[0])).subjects)
    with pytest.raises(ConvloraError, match="identities=3 must be the number of albums, 2"):
        Cohort(tmp_path, 3, 1, 2, 9, albums=albums)
    with pytest.raises(ConvloraError, match="no drawn people for ffhq.safetensors"):
        Cohort(tmp_path, generator="ffhq.safetensors")
    subject = Cohort(tmp_path, 2, 1, 2, 9, albums=albums).subjects[0]
    with pytest.raises(ConvloraError, match="Ann has 3 photos to learn from, not 5"):
        Cohort(tmp_path, 2, 1, 2, 9, albums=albums).album(subject, 5)
    empty = tmp_path / "empty"
    shutil.copytree(albums[0], empty)
    manifest = json.loads((empty / "manifest.json").read_text())
    manifest["split"]["train"] += manifest["split"].pop("test")
    (empty / "manifest.json").write_text(json.dumps(manifest | {"split": {**manifest["split"], "test": []}}))
    with pytest.raises(ConvloraError, match="4 photos to learn from and 0 held out"):
        list(Cohort(tmp_path, 1, 1, 2, 9, albums=(empty,)).subjects)


SMALL = (
    "--identities 2 --seeds 1 --photos 3 --largest 5 --tests 2 --steps 2 --sizes 2,3,5 --ranks 1,2 --views 2 "
    "--samples 4 --pairs 1 --latent-steps 2 --tune-steps 2 --project-steps 2 --directions 40 --enhanced 1 --quiet"
).split()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_study_runs_and_a_second_call_trains_nothing(tmp_path, capsys) -> None:
    out = tmp_path / "studies"
    assert cli.main(["eg3d", "study", "all", "--out", str(out), *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [study["study"] for study in found["studies"]] == list(STUDIES)
    for study in found["studies"]:
        assert study["people"] == 2 and study["summary"]
        for summary in study["summary"].values():
            assert all(math.isfinite(interval["mean"]) for interval in summary.values())
    models = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert cli.main(["eg3d", "study", "F9", "--out", str(out), *SMALL]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == models
