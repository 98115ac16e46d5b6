"""How small a fault a family of detectors still detects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from foreshock.analysis.figures.smallest import smallest_figure
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.delays import smallest_table
from foreshock.experiments.validation import check_named


class Smallest(Kind):
    pictures = (("figure", smallest_figure),)
    every_model = True
    needs = ("family",)
    by_size = True

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        return {"smallest": smallest_table(contest)}

    def check(self, experiment: Mapping[str, Any]) -> None:
        super().check(experiment)
        check_named([experiment["family"]], experiment["detectors"], "experiment.family")
