"""The report of an experiment whose runs are judged each by itself: a figure, ``zoo.csv`` and a line a case."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from foreshock.analysis.figures.cases import cases_figure
from foreshock.analysis.runs.index import read_index
from foreshock.analysis.scores.cases import ALL_LAWS, case_table


def make_case_report(report: Path, runs: Path) -> pd.DataFrame:
    """Score the runs that ``report/experiment.json`` lists and write ``zoo.csv`` and ``figure.png`` there.

    Prints a line a case, and returns the table.
    """
    index = read_index(report)
    table = case_table(index, runs)
    table.to_csv(report / "zoo.csv", index=False, float_format="%.6g")
    cases_figure(table, report / "figure.png")
    grid = Table(title=index["experiment"]["title"], title_justify="left")
    grid.add_column("case")
    for heading in ("runs", "RMS", "a run's RMS", "largest", "threshold", "alarms, 5 %", "alarms, 0.1 %", "declined"):
        grid.add_column(heading, justify="right")
    for row in table[table["law"] == ALL_LAWS].itertuples():
        grid.add_row(
            row.label, str(row.runs), f"{row.rms:.2f}", f"{row.rms_lowest_run:.2f} to {row.rms_highest_run:.2f}",
            f"{row.largest:.2f}", f"{row.threshold_5pct:.2f}", str(row.alarms_5pct), str(row.alarms_01pct),
            f"{row.declined_share:.1%}",
        )  # fmt: skip
    Console(width=130).print(grid)
    return table
