"""Two faults on a grid, a heat map a panel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreshock.analysis.figures.routers import grid_figure
from foreshock.analysis.reports.kinds.base import Kind


class Grid(Kind):
    pictures = (("figure", lambda contest, path: grid_figure(contest.experiment, path)),)
    needs = ("healthy_cell",)

    def check(self, experiment: Mapping[str, Any]) -> None:
        super().check(experiment)
        without = next((name for name, fault in experiment["faults"].items() if not fault.get("cell")), None)
        if without:
            raise ValueError(f"experiment.faults.{without}.cell is missing: experiment.draw={self.name} needs it")
