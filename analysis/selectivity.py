"""Who alarms for what: the share of each fault's runs in which each detector alarms in time."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.experiment import Experiment


def alarm_matrix(experiment: Experiment) -> pd.DataFrame:
    """P[detector, fault]: share of runs with an alarm from onset and before divergence, or the run's end.

    The first column, ``healthy``, is the share of healthy test runs with any alarm (NaN without test runs).
    Declined detectors are left out. Values in [0, 1].
    """
    rows = {}
    for name in experiment.named_detectors:
        detector = experiment.detectors[name]
        if detector.declined:
            continue
        tests = [detector.alarms[run.trace.run_id] is not None for run in experiment.of("test")]
        row = {"healthy": np.mean(tests) if tests else np.nan}
        for fault in experiment.faults:
            outcomes = [experiment.score(detector, run).outcome for run in experiment.of("faulty", fault=fault)]
            row[fault] = np.mean([outcome in ("lead", "benign_alarm") for outcome in outcomes])
        rows[name] = row
    return pd.DataFrame(rows).T


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
