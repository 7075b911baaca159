"""What a study found: every single value, and from them tables, claims held against the paper's, JSON and CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from convlora.errors import ConvloraError, FileError
from convlora.integrations.eg3d.metrics.bootstrap import Interval, bootstrap, paired_difference
from convlora.integrations.eg3d.run_folder import write_text
from convlora.integrations.eg3d.studies.plots import plot

Verdict = Literal["holds", "does not hold", "undecided"]


class Value(NamedTuple):
    """One measurement: `item` is the photo, pair or sample it was taken of, the same for all models."""

    model: str
    metric: str
    person: str
    seed: int
    item: str
    value: float


class Claim(NamedTuple):
    """A statement of the paper as a comparison: the metric of `better` minus that of `worse` lies above `margin`.

    With a negative margin it says "not worse by more than".
    """

    text: str
    metric: str
    better: str
    worse: str
    margin: float = 0.0
    lower_is_better: bool = False


@dataclass
class Results:
    """All values of a study, what it is, and how the paper's table reads."""

    name: str
    title: str
    metrics: dict[str, str]  # name -> what it is, with "higher" or "lower is better"
    claims: list[Claim] = field(default_factory=list)
    paper: dict[str, dict[str, str]] = field(default_factory=dict)  # model -> metric -> the paper's number
    values: list[Value] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    axis: str | None = None  # a name that items end with, before a number: results are drawn as curves over it
    facts: dict[str, Any] = field(default_factory=dict)  # how it was made: command, settings, date, device, …
    extends: dict[str, Any] = field(default_factory=dict)  # how the earlier results were made that it goes on from

    def add(self, model: str, metric: str, person: str, seed: int, values: Mapping[str, float]) -> None:
        if metric not in self.metrics:
            raise ConvloraError(f"study {self.name} has no metric {metric!r}; there are {', '.join(self.metrics)}")
        self.values += [Value(model, metric, person, seed, item, float(value)) for item, value in values.items()]

    def models(self) -> list[str]:
        return list(dict.fromkeys(value.model for value in self.values))

    def has(self, model: str, metric: str) -> bool:
        return any((value.model, value.metric) == (model, metric) for value in self.values)

    def interval(self, model: str, metric: str) -> Interval:
        """The mean over people with its 95 % interval."""
        return bootstrap([list(group.values()) for group in self._of(model, metric).values()])

    def difference(self, first: str, second: str, metric: str) -> Interval:
        """first − second over what both were measured on, paired."""
        one, other = self._of(first, metric), self._of(second, metric)
        people = [person for person in one if person in other]
        shared = {p: [item for item in one[p] if item in other[p]] for p in people}
        people = [p for p in people if shared[p]]
        return paired_difference([[one[p][i] for i in shared[p]] for p in people],
                                 [[other[p][i] for i in shared[p]] for p in people])  # fmt: skip

    def verdict(self, claim: Claim) -> tuple[Verdict, Interval]:
        """Whether the whole interval of the difference lies above the margin, below it, or neither."""
        found = self.difference(claim.better, claim.worse, claim.metric)
        if claim.lower_is_better:
            found = found._replace(mean=-found.mean, low=-found.high, high=-found.low)
        if found.low > claim.margin:
            return "holds", found
        return ("does not hold" if found.high < claim.margin else "undecided"), found

    def table(self) -> str:
        """Models by metrics, means with 95 % intervals over people, beside the paper's numbers."""
        header = ["model", *(f"{name}" for name in self.metrics)]
        rows = [header]
        for model in self.models():
            cells = [model]
            for metric in self.metrics:
                paper = self.paper.get(model, {}).get(metric)
                text = str(self.interval(model, metric)) if self.has(model, metric) else "–"
                cells.append(text + (f"  (paper {paper})" if paper else ""))
            rows.append(cells)
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])

    def verdicts(self) -> str:
        lines = []
        for claim in self.claims:
            verdict, found = self.verdict(claim)
            lines.append(f"{verdict}: {claim.text} ({claim.metric}, difference {found}, margin {claim.margin:g})")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        people = {value.person for value in self.values}
        summary = {
            model: {
                metric: self.interval(model, metric)._asdict() for metric in self.metrics if self.has(model, metric)
            }
            for model in self.models()
        }
        claims = [
            {**claim._asdict(), "verdict": verdict, "difference": found._asdict()}
            for claim in self.claims
            for verdict, found in [self.verdict(claim)]
        ]
        return {
            "study": self.name, "title": self.title, "metrics": self.metrics, "people": len(people),
            "summary": summary, "paper": self.paper, "claims": claims, "notes": self.notes, "axis": self.axis,
            "facts": self.facts | ({"extends": self.extends} if self.extends else {}),
        }  # fmt: skip

    def write(self, folder: Path) -> list[Path]:
        """`<name>.json`, `<name>.csv` with every value on a line, and `<name>.png` where matplotlib is installed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Value._fields)
        writer.writerows(self.values)
        table, data = folder / f"{self.name}.csv", folder / f"{self.name}.json"
        write_text(table, text.getvalue())
        write_text(data, json.dumps(self.json(), indent=1, ensure_ascii=False))
        with contextlib.suppress(ConvloraError):
            return [data, table, plot(self, folder / f"{self.name}.png")]
        return [data, table]

    @staticmethod
    def read(folder: Path, name: str) -> Results:
        """What `write` wrote.

        Raises:
            FileError: a file is missing, or damaged.
        """
        try:
            told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            rows = list(csv.DictReader((folder / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
            values = [
                Value(r["model"], r["metric"], r["person"], int(r["seed"]), r["item"], float(r["value"])) for r in rows
            ]
            claims = [Claim(**{key: claim[key] for key in Claim._fields}) for claim in told["claims"]]
            kept = {key: told[key] for key in ("title", "metrics", "paper", "notes", "axis", "facts")}
            return Results(name, claims=claims, values=values, **kept)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{folder} holds no readable results of study {name}: {error!r}") from error

    def _of(self, model: str, metric: str) -> dict[str, dict[str, float]]:
        """person -> (seed and item) -> value."""
        found: dict[str, dict[str, float]] = {}
        for value in self.values:
            if value.model == model and value.metric == metric and np.isfinite(value.value):
                found.setdefault(value.person, {})[f"{value.seed}/{value.item}"] = value.value
        if not found:
            raise ConvloraError(f"study {self.name} has no values of {metric!r} for {model!r}")
        return found


def by_name(names: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    """Values by the name of what they were measured on."""
    return dict(zip(names, (float(value) for value in values), strict=True))
