"""Faults against a control of the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from foreshock.analysis.figures.paired import paired_figure
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.paired import drift_table, paired_table
from foreshock.experiments.validation import check_named


class Paired(Kind):
    pictures = (("figure", lambda contest, path: paired_figure(contest.experiment, path)),)
    every_model = True
    needs = ("control", "drift")

    def model_tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        return {"paired": paired_table(contest.experiment), "drift": drift_table(contest.experiment)}

    def check(self, experiment: Mapping[str, Any]) -> None:
        super().check(experiment)
        check_named([experiment["control"]], experiment["faults"], "experiment.control")
