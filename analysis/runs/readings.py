"""Single numbers out of a run's signals: the curve a figure draws, and where it stands at the end."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from foreshock.analysis.runs.align import positions
from foreshock.analysis.runs.experiment import HEALTHY_ROLES, Experiment, ScoredRun

REDUCTIONS = ("worst", "mean")
END_SHARE = 0.1
"""A run's end is the mean over this last part of what is compared: one batch is too noisy to stand for it."""


def curve(experiment: Experiment, run: ScoredRun, panel: Mapping[str, Any]) -> pd.Series:
    """One run's curve of a panel against position, up to the horizon.

    panel: ``signals`` and ``reduce``: ``worst`` of signals, layers and heads (lowest where down is bad, else
    highest) or their ``mean``, of the latest reading of each. Missing samples are left out of it. ``above_healthy``:
    less the healthy runs' median.
    """
    own = _reduced(experiment, run, panel)
    if not panel.get("above_healthy", False):
        return own
    healthy = pd.concat([_reduced(experiment, other, panel) for other in runs_of(experiment, None)], axis=1)
    return own - healthy.median(axis=1).reindex(own.index, method="ffill")


def _reduced(experiment: Experiment, run: ScoredRun, panel: Mapping[str, Any]) -> pd.Series:
    signals, reduce = panel["signals"], panel.get("reduce", "worst")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is not allowed: one of {', '.join(REDUCTIONS)}")
    series = [run.signal(name) for name in signals]
    values = [np.where(s.undefined, np.nan, s.values).reshape(len(s.steps), s.values[:1].size or 1) for s in series]
    tables = [pd.DataFrame(x, positions(s, experiment.axis)) for x, s in zip(values, series, strict=True)]
    every = functools.reduce(pd.Index.union, (table.index for table in tables))
    table = pd.concat([table.reindex(every, method="ffill") for table in tables], axis=1, ignore_index=True)
    if reduce == "mean":
        reduced = table.mean(axis=1)
    else:
        reduced = table.min(axis=1) if experiment.signals[signals[0]].bad == "down" else table.max(axis=1)
    return reduced[reduced.index <= experiment.horizon]


def runs_of(experiment: Experiment, fault: str | None) -> list[ScoredRun]:
    """A fault's runs, or all healthy ones."""
    return experiment.of(*HEALTHY_ROLES) if fault is None else experiment.of("faulty", fault=fault)


def common_end(experiment: Experiment, faults: Sequence[str | None]) -> int:
    """The last position that all runs of these faults reach."""
    return min(run.horizon for fault in faults for run in runs_of(experiment, fault))


def at_end(experiment: Experiment, fault: str | None, panel: Mapping[str, Any], end: int) -> np.ndarray:
    """Each run's mean over the last tenth before ``end``; a run that broke off counts with its own last tenth.

    NaN where the signal has no sample by then.
    """
    ends = []
    for run in runs_of(experiment, fault):
        values = curve(experiment, run, panel)
        values = values[values.index <= end]
        last = values.index.max() if len(values) else 0
        ends.append(float(values[values.index > last * (1 - END_SHARE)].mean()))
    return np.array(ends)


def end_table(experiment: Experiment) -> pd.DataFrame:
    """Every panel's value at the common end: one row a model, panel, fault and seed."""
    faults = [None, *experiment.faults]
    end = common_end(experiment, faults)
    rows = [
        {
            "model": experiment.model,
            "panel": name,
            "signals": " ".join(panel["signals"]),
            "reduce": panel.get("reduce", "worst"),
            "fault": fault or "healthy",
            "seed": run.seed,
            f"at_{experiment.axis}": end,
            "value": value,
        }
        for name, panel in experiment.panels.items()
        for fault in faults
        for run, value in zip(runs_of(experiment, fault), at_end(experiment, fault, panel, end), strict=True)
    ]
    return pd.DataFrame(rows)
