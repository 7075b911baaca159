"""The outcome of a personalisation: numbers for the terminal and report.json, and one HTML page with the pictures."""

from __future__ import annotations

from convlora.integrations.eg3d.report.content import Axis, Report, Row, Spread, Stage, Views
from convlora.integrations.eg3d.report.numbers import moved_cameras, result_json, table
from convlora.integrations.eg3d.report.page import write_report
from convlora.integrations.eg3d.report.results import write_results
from convlora.integrations.eg3d.report.stages import Plan, best_spanned, explore

__all__ = [
    "Axis", "Plan", "Report", "Row", "Spread", "Stage", "Views", "best_spanned", "explore", "moved_cameras",
    "result_json", "table", "write_report", "write_results",
]  # fmt: skip
