"""Alarms that were raised elsewhere: a table of runs and steps is enough to enter the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foreshock.analysis.detect.controls import CONTROLS
from foreshock.analysis.runs.csv_table import read_table
from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.faults.card import BENIGN

SCORED = ("test", "faulty")
"""Roles of the runs that a board scores; of a monitor that has listed one, alarms in benign runs are counted too."""


def read_alarms(paths: Sequence[Path], experiments: Sequence[Experiment]) -> list[dict[str, dict[str, int | None]]]:
    """For each experiment, by monitor, alarms by run id, out of CSV files with columns run_id, monitor, step.

    An empty step is a run without alarm, and so is a run that a monitor does not list; an experiment of which it
    lists no run it does not enter. Raises ValueError on files that are no table, missing columns, unknown or repeated
    runs, steps that are no whole numbers from 0, alarms after a run's end, a control's name, and files without a scored
    run (test or faulty), naming file and line.
    """
    runs = {run.trace.run_id: (index, run) for index, experiment in enumerate(experiments) for run in experiment.runs}
    alarms: list[dict[str, dict[str, int | None]]] = [{} for _ in experiments]
    listed: set[tuple[str, str]] = set()
    in_benign: list[tuple[int, str, str, int | None]] = []
    for path in paths:
        table = read_table(path, f"alarms={path}", ("run_id", "monitor", "step"), text=("run_id", "monitor"))
        scored = False
        for line, row in enumerate(table.itertuples(index=False), start=2):
            where = f"alarms={path}, line {line}"
            if pd.isna(row.monitor):
                raise ValueError(f"{where}: monitor is empty: give it a name")
            if row.monitor in CONTROLS:
                raise ValueError(f"{where}: monitor={row.monitor!r} is a control's name: give it a name of its own")
            if row.run_id not in runs:
                raise ValueError(f"{where}: run_id={row.run_id!r} is not one of the {len(runs)} runs")
            if (row.monitor, row.run_id) in listed:
                raise ValueError(f"{where}: run {row.run_id} has two alarms of {row.monitor!r}")
            listed.add((row.monitor, row.run_id))
            index, run = runs[row.run_id]
            step = _step(row.step, run, experiments[index], where)
            if run.role in SCORED:
                scored = True
                others = experiments[index].of(*SCORED, BENIGN)
                blank: dict[str, int | None] = {other.trace.run_id: None for other in others}
                alarms[index].setdefault(row.monitor, blank)[row.run_id] = step
            elif run.role == BENIGN:
                in_benign.append((index, row.monitor, row.run_id, step))
        if not scored:
            raise ValueError(f"alarms={path} lists no run that is scored: it needs test or faulty ones")
    for index, monitor, run_id, step in in_benign:
        if monitor in alarms[index]:
            alarms[index][monitor][run_id] = step
    return alarms


def _step(given: Any, run: ScoredRun, experiment: Experiment, where: str) -> int | None:
    if pd.isna(given):
        return None
    step = float(pd.to_numeric(given, errors="coerce"))
    if not 0 <= step < np.inf or step != int(step):
        raise ValueError(f"{where}: step={given!r} is not allowed: a whole number from 0")
    if step > experiment.horizon:
        raise ValueError(f"{where}: step={int(step)} is beyond the horizon of {experiment.horizon}")
    done = run.trace.manifest["steps_done"]
    if experiment.axis == "steps" and step > done:
        raise ValueError(f"{where}: step={int(step)} is after the run's end at {done}")
    return int(step)
