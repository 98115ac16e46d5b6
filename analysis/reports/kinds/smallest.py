"""How small a fault a family of detectors still detects."""

from __future__ import annotations

import pandas as pd

from foreshock.analysis.figures.smallest import smallest_figure
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.delays import smallest_table


class Smallest(Kind):
    name = "smallest"
    pictures = (("figure", smallest_figure),)
    every_model = True
    needs = ("family",)
    by_size = True

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        return {"smallest": smallest_table(contest)}
