"""Who alarms for what: the share of each fault's runs in which each detector alarms in time."""

from __future__ import annotations

import numpy as np
import pandas as pd

from foreshock.analysis.locate.attribution import alarm_probabilities
from foreshock.analysis.runs.catalogue import catalogue
from foreshock.analysis.runs.experiment import HEALTHY, Experiment
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.table import run_table


def alarm_matrix(contest: Contest) -> pd.DataFrame:
    """``attribution.alarm_probabilities`` of the experiment's named detectors; declined ones are left out."""
    outcomes = run_table(contest)
    return alarm_probabilities(outcomes[outcomes["detector"].isin(contest.experiment.named_detectors)])


def off_diagonal(experiment: Experiment, matrix: pd.DataFrame) -> pd.DataFrame:
    """Each family, a jointly calibrated detector, on the faults that ``should_ignore`` of the experiment's YAML names.

    Columns family, fault, alarm_probability, runs, and alpha, the rate that chance alone would give.
    """
    rows = [
        (family, fault, matrix.loc[family, fault], len(experiment.of("faulty", fault=fault)), experiment.alpha)
        for family, ignores in experiment.index["experiment"].get("should_ignore", {}).items()
        if family in matrix.index
        for fault in ignores
        if fault in matrix.columns
    ]
    return pd.DataFrame(rows, columns=["family", "fault", "alarm_probability", "runs", "alpha"])


def any_alarm(scores: pd.DataFrame) -> pd.DataFrame:
    """Outcomes in which any alarm at any time counts: who names a fault does not know its onset or its end."""
    alarmed, healthy = scores["alarm"].notna(), scores["fault"] == HEALTHY
    outcome = np.select([alarmed & healthy, alarmed], ["false_alarm", "lead"], "quiet")
    return scores.assign(outcome=outcome)


ANSWERS = {
    "attention numerics": ("attention", "both"),
    "lr": ("ramp", "both"),
    "batch": ("batch8",),
    "aux loss off": ("aux_off",),
}
"""What the catalogue's ``answers_to`` calls the faults of the reference set."""


def designed_for(contest: Contest) -> dict[str, set[str]]:
    """By family, the faults that the catalogue says its monitors answer to."""
    faults: dict[str, set[str]] = {}
    for _, row in catalogue().iterrows():
        for cause in str(row["answers_to"]).split("; "):
            faults.setdefault(row["family"], set()).update(set(ANSWERS.get(cause, ())) & set(contest.experiment.faults))
    return faults
