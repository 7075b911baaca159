"""The outcome of a personalisation: numbers for the terminal and report.json, and one HTML page with the pictures."""

from __future__ import annotations

from convlora.integrations.eg3d.report.content import Report, Row, Spread, Views
from convlora.integrations.eg3d.report.numbers import moved_cameras, result_json, table
from convlora.integrations.eg3d.report.page import write_report
from convlora.integrations.eg3d.report.results import write_results

__all__ = ["Report", "Row", "Spread", "Views", "moved_cameras", "result_json", "table", "write_report", "write_results"]
