"""Detectors against faults: who alarms for what."""

from __future__ import annotations

import pandas as pd

from foreshock.analysis.figures.routers import selectivity_figure
from foreshock.analysis.locate.selectivity import alarm_matrix, off_diagonal
from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.scores.contest import Contest


class Selectivity(Kind):
    pictures = (("figure", selectivity_figure),)

    def tables(self, contest: Contest) -> dict[str, pd.DataFrame]:
        return selectivity_tables(contest)


def selectivity_tables(contest: Contest) -> dict[str, pd.DataFrame]:
    """The shares of alarms of each detector under each fault, and those that its family should ignore."""
    matrix = alarm_matrix(contest)
    return {
        "selectivity": matrix.rename_axis(index="detector", columns=None).reset_index(),
        "off_diagonal": off_diagonal(contest.experiment, matrix),
    }
