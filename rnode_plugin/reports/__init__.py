"""From run folders to tables and figures: one HTML file that opens offline, and Markdown."""

from __future__ import annotations

from .writing import Report, write_report

__all__ = ["Report", "write_report"]
