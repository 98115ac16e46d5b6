"""Faults against a control of the same seeds: does one that raises no alarm change anything at all?

An experiment with ``draw: paired`` names the fault that the others are compared with (``control``), the readings that
are compared (``figure``) and signals whose errors would add up if they kept their sign (``drift``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from foreshock.analysis.detect.rounding import mean_resolution
from foreshock.analysis.runs.align import positions
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.runs.readings import at_end, common_end
from foreshock.analysis.scores.inference import bca_interval

WARM_UP_SHARE = 0.2
"""Readings before this share of a run are left out of its drift: a signal's level still moves with the weights."""


def _named(experiment: Experiment, key: str) -> Any:
    """What the experiment's file says under a key. Raises ValueError where it says nothing."""
    if key not in experiment.index["experiment"]:
        raise ValueError(f"experiment.{key} is missing: experiment.draw=paired needs it")
    return experiment.index["experiment"][key]


def control_of(experiment: Experiment) -> str:
    """The fault that the others are paired with. Raises ValueError where it was not run, or not with their seeds."""
    control = _named(experiment, "control")
    if control not in experiment.faults:
        raise ValueError(f"experiment.control={control!r} is not allowed: one of {', '.join(experiment.faults)}")
    seeds = {fault: [run.seed for run in experiment.of("faulty", fault=fault)] for fault in experiment.faults}
    other = next((fault for fault in seeds if seeds[fault] != seeds[control]), None)
    if other:
        raise ValueError(f"experiment.control={control!r} is not allowed: {other!r} has other seeds")
    return control


def differences(experiment: Experiment, name: str) -> dict[str, np.ndarray]:
    """By fault but the control, each seed's reading of a panel at the end minus that of the control, (seeds,)."""
    control, panel = control_of(experiment), experiment.panels[name]
    end = common_end(experiment, experiment.faults)
    baseline = at_end(experiment, control, panel, end)
    return {f: at_end(experiment, f, panel, end) - baseline for f in experiment.faults if f != control}


def paired_table(experiment: Experiment) -> pd.DataFrame:
    """One row a panel and fault: the control's mean at the end (``analysis.runs.readings``), the mean difference to it.

    low, high: 95 % BCa interval over seeds, NaN under 10 of them, as in ``scores.inference``; not adjusted for the
    number of rows. A reading that is not finite makes its row's mean NaN, without an interval.
    """
    rows = []
    for name, panel in experiment.panels.items():
        end = common_end(experiment, experiment.faults)
        level = at_end(experiment, control_of(experiment), panel, end).mean()
        for fault, values in differences(experiment, name).items():
            finite = np.isfinite(values).all()
            low, high = bca_interval(values, np.ones(len(values))) if finite else (np.nan, np.nan)
            rows.append((name, fault, len(values), level, values.mean() if finite else np.nan, low, high))
    columns = ["panel", "fault", "seeds", "control_mean", "mean_difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def drift_table(experiment: Experiment) -> pd.DataFrame:
    """One row a signal of ``drift``, fault, seed, layer and head: do its readings over the run keep a sign?

    mean: of the readings after warm-up, in the signal's unit; t: mean over its standard error, of size 1 where
    readings are independent with mean 0 (a root mean square over many heads tells); same_sign: share of the readings
    that have the more common sign, from 0.5 to 1, a zero counting half. All are NaN under 2 readings; t also where all
    are equal.
    """
    rows = []
    for name in _named(experiment, "drift"):
        signal = experiment.signals.get(name)
        if signal is None or signal.axes != ("layer", "head"):
            raise ValueError(f"experiment.drift={name!r} is not allowed: a signal of layers and heads")
        for fault in experiment.faults:
            for run in experiment.of("faulty", fault=fault):
                series = run.signal(name)
                where = positions(series, experiment.axis)
                late = (where > WARM_UP_SHARE * experiment.horizon) & (where <= experiment.horizon)
                values = np.where(series.undefined, np.nan, series.values)[late]
                for layer, head in np.ndindex(values.shape[1:]):
                    readings = values[:, layer, head]
                    rows.append((name, fault, run.seed, layer, head, *_drift(readings[~np.isnan(readings)])))
    columns = ["signal", "fault", "seed", "layer", "head", "readings", "mean", "t", "same_sign"]
    return pd.DataFrame(rows, columns=columns)


def _drift(readings: np.ndarray) -> tuple[int, float, float, float]:
    n = len(readings)
    if n < 2:
        return n, np.nan, np.nan, np.nan
    mean, spread = readings.mean(), readings.std(ddof=1)
    t = mean * np.sqrt(n) / spread if spread > mean_resolution(readings) else np.nan
    return n, mean, t, (1 + abs(np.sign(readings).mean())) / 2
