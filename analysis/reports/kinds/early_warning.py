"""How soon each monitor alarms, under faults of one bit and more, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from foreshock.analysis.figures.costs import cost_figure
from foreshock.analysis.figures.routers import selectivity_figure
from foreshock.analysis.figures.sizes import size_figure
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.reports.kinds.selectivity import selectivity_tables
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.delays import blind_table, smallest_table
from foreshock.experiments.validation import check_named


class EarlyWarning(Kind):
    pictures = (("figure", cost_figure), ("sizes", size_figure), ("selectivity", selectivity_figure))
    every_model = True
    needs = ("family",)
    by_size = True

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        return {"smallest": smallest_table(contest), "blind": blind_table(contest)}

    def tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        return selectivity_tables(contest)

    def check(self, experiment: Mapping[str, Any]) -> None:
        super().check(experiment)
        check_named([experiment["family"]], experiment["detectors"], "experiment.family")
