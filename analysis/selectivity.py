"""Who alarms for what: the share of each fault's runs in which each detector alarms in time."""

from __future__ import annotations

import pandas as pd

from analysis.attribution import alarm_probabilities
from analysis.experiment import Experiment
from analysis.table import run_table


def alarm_matrix(experiment: Experiment) -> pd.DataFrame:
    """``attribution.alarm_probabilities`` of the experiment's named detectors; declined ones are left out."""
    outcomes = run_table(experiment)
    return alarm_probabilities(outcomes[outcomes["detector"].isin(experiment.named_detectors)])


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
