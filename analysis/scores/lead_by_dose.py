"""How the lead of each detector changes with the dose of a fault."""

from __future__ import annotations

import pandas as pd

from foreshock.analysis.scores.contest import OWN, Contest, run_scores
from foreshock.analysis.scores.leaderboard import board

POSSIBLE = "onset oracle"
"""The control whose lead is the most that any detector could have."""


def lead_by_dose(contest: Contest) -> pd.DataFrame:
    """A row for each detector of the experiment and dose, and for the onset oracle.

    Columns: detector, dose, runs, diverged, lead_steps (mean restricted lead over the runs that diverge, a miss counts
    0; NaN where none does), lead_low and lead_high (95 % over seeds, NaN under 10 seeds), detected (share of runs with
    an alarm in time), healthy_alarms, healthy_runs. Declined detectors have no rows.
    """
    named = contest.without_singles()
    rows = board(named, run_scores(named))
    faults = contest.experiment.index["experiment"]["faults"]
    of_doses = rows["fault"].isin(list(faults)) & rows["declined"].isna()
    rows = rows[of_doses & (rows["kind"].isin(OWN) | (rows["detector"] == POSSIBLE))]
    rows = rows.assign(dose=rows["fault"].map({name: fault["dose"] for name, fault in faults.items()}))
    rows = rows.rename(columns={"rmlt_steps": "lead_steps", "rmlt_low": "lead_low", "rmlt_high": "lead_high"})
    columns = ["lead_steps", "lead_low", "lead_high", "detected", "healthy_alarms", "healthy_runs"]
    table = rows[["detector", "dose", "runs", "diverged", *columns]]
    return table.sort_values(["detector", "dose"], kind="stable").reset_index(drop=True)
