"""Signals under every fault over the healthy band, all views side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foreshock.analysis.figures.routers import dose_figure
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest


class Doses(Kind):
    def draw(self, views: Sequence[Contest], report: Path) -> list[tuple[str, Path]]:
        path = report / "figure.png"
        return [(dose_figure([contest.experiment for contest in views], path), path)]
