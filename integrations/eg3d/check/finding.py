"""What a check says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Status = Literal["ok", "warning", "error", "not tested"]


class Finding(NamedTuple):
    """The outcome of one check: what was seen, with numbers, and what to do about it (empty if nothing)."""

    check: str
    status: Status
    evidence: str
    remedy: str = ""


def table(findings: Sequence[Finding]) -> str:
    """One line per check, remedies indented below."""
    wide, status = max(len(f.check) for f in findings), max(len(f.status) for f in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status.ljust(status)}  {finding.check.ljust(wide)}  {finding.evidence}".rstrip())
        if finding.remedy:
            lines.append(f"{'':{status}}  {'':{wide}}  → {finding.remedy}")
    return "\n".join(lines)
