"""Runs from elsewhere in the contest of all boards: at equal false alarms in a cell and pooled, and by fixed rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from foreshock.analysis.detect.controls import random_timer
from foreshock.analysis.detect.detection import Detector
from foreshock.analysis.detect.fixed_rules import FixedRule
from foreshock.analysis.detect.own_past import Statistic, Watcher, own_past, paths
from foreshock.analysis.detect.tracks.by_name import TRACKS
from foreshock.analysis.detect.twins import leave_one_out, pooled_thresholds
from foreshock.analysis.runs.elsewhere import TRAIN_LOSS, Cell
from foreshock.analysis.runs.experiment import HEALTHY
from foreshock.analysis.scores.contest import Contest, run_scores
from foreshock.analysis.scores.inference import bca_interval, clopper_pearson_interval, wilson_interval

IN_CELL, POOLED, FIXED = "cell", "pooled", "fixed"
"""Where a threshold comes from: the other twins of the cell, all other cells, or a number that nobody calibrates."""

NAMES = {TRAIN_LOSS: "training loss", "grad_global_norm": "gradient norm"}
"""What tables call a signal."""


@dataclass(frozen=True)
class Judged:
    """Cells, and what every detector has seen in their runs, whatever the label.

    paths: by detector that needs a threshold, cell and run id; rules: without calibration; fixed: their alarms, by
    rule and run id, for the runs of cells that have their signal.
    """

    cells: tuple[Cell, ...]
    watchers: tuple[Watcher, ...]
    paths: Mapping[str, Mapping[str, Mapping[str, Statistic]]]
    rules: tuple[FixedRule, ...]
    fixed: Mapping[str, Mapping[str, int | None]]

    def labelled(self, cells: Sequence[Cell]) -> Judged:
        """The same of cells of the same runs with another label."""
        return replace(self, cells=tuple(cells))

    def maxima(self, watcher: str, cell: Cell) -> dict[str, float]:
        """The path maxima of the cell's healthy runs."""
        of_cell = self.paths[watcher][cell.name]
        return {run.trace.run_id: of_cell[run.trace.run_id].maximum for run in cell.healthy}

    def thresholds(self, watcher: str, alpha: float, pooled: bool) -> dict[str, dict[str, float]]:
        """By cell and run id; runs that get none are left out. Raises ValueError where cells are too few for alpha."""
        healthy = {cell.name: self.maxima(watcher, cell) for cell in self.cells}
        runs = {cell.name: [run.trace.run_id for run in cell.experiment.runs] for cell in self.cells}
        if not pooled:
            return {name: leave_one_out(healthy[name], runs[name], alpha) for name in runs}
        known = pooled_thresholds(healthy, runs, alpha)
        return {name: {run: known[run] for run in of_cell if run in known} for name, of_cell in runs.items()}


def judge(cells: Sequence[Cell], rules: Sequence[FixedRule] = ()) -> Judged:
    """Every detector of a signal's own past, and every rule, in every run of these cells.

    Detectors watch the signals that all cells with a judged run have, so that all are compared on the same runs.
    """
    watchers: list[Watcher] = []
    for signal in shared_signals(cells):
        described = next(cell.experiment.signals[signal] for cell in cells if cell.experiment.runs)
        watchers += own_past(NAMES.get(signal, signal), signal, described.bad)
    known = {w.name: {cell.name: paths(w, cell.experiment.runs) for cell in cells} for w in watchers}
    fixed = {
        rule.name: {
            run.trace.run_id: rule.alarm(run)
            for cell in cells
            if rule.signal in cell.signals
            for run in cell.experiment.runs
        }
        for rule in rules
    }
    return Judged(tuple(cells), tuple(watchers), known, tuple(rules), fixed)


def shared_signals(cells: Sequence[Cell]) -> list[str]:
    """The signals that all cells with a judged run have."""
    known = [cell.signals for cell in cells if cell.experiment.runs]
    return [name for name in known[0] if all(name in signals for signals in known)] if known else []


def calibrated_scores(judged: Judged, alpha: float, pooled: bool) -> pd.DataFrame:
    """One row a detector and run (``contest.run_scores``) at a false-alarm rate, with columns scope, alpha, cell.

    Runs that no detector has a threshold for are left out, the same for all detectors; a random timer of the same rate
    stands beside them.
    """
    limits = {watcher.name: judged.thresholds(watcher.name, alpha, pooled) for watcher in judged.watchers}
    tables = []
    for cell in judged.cells:
        runs = [
            run
            for run in cell.experiment.runs
            if limits and all(run.trace.run_id in of_watcher[cell.name] for of_watcher in limits.values())
        ]
        if not runs:
            continue
        experiment = replace(cell.experiment, runs=tuple(runs))
        detectors, kinds = {}, {}
        for watcher in judged.watchers:
            seen, limit = judged.paths[watcher.name][cell.name], limits[watcher.name][cell.name]
            alarms = {run.trace.run_id: seen[run.trace.run_id].alarm(limit[run.trace.run_id]) for run in runs}
            detectors[watcher.name] = Detector(watcher.name, (watcher.signal,), alarms=alarms)
            kinds[watcher.name] = "baseline" if watcher.signal == TRAIN_LOSS else "detector"
        timer = {run.trace.run_id: random_timer(run, experiment, alpha) for run in runs}
        detectors["random timer"], kinds["random timer"] = Detector("random timer", (), alarms=timer), "control"
        tables.append(_of_cell(cell, Contest(experiment, TRACKS["self"], alpha, detectors, kinds)))
    return _joined(tables, POOLED if pooled else IN_CELL, alpha)


def fixed_scores(judged: Judged) -> pd.DataFrame:
    """The same of rules whose number nobody calibrates, in every judged run that has their signal."""
    tables = []
    for cell in judged.cells:
        own = [rule for rule in judged.rules if rule.signal in cell.signals]
        if cell.experiment.runs and own:
            detectors = {r.name: Detector(r.name, (r.signal,), alarms=judged.fixed[r.name]) for r in own}
            kinds = {rule.name: rule.kind for rule in own}
            tables.append(_of_cell(cell, Contest(cell.experiment, TRACKS["published"], np.nan, detectors, kinds)))
    return _joined(tables, FIXED, np.nan)


def _of_cell(cell: Cell, contest: Contest) -> pd.DataFrame:
    """The scores of a cell, with ``check_steps``: from the label's reading before the rise to the one that shows it."""
    checks = {}
    for run in cell.experiment.of("faulty"):
        steps = run.signal(cell.label.signal).steps
        at = int(np.searchsorted(steps, run.divergence or 0))
        checks[run.trace.run_id] = float(steps[at] - steps[at - 1]) if at else np.nan
    scores = run_scores(contest)
    return scores.assign(cell=cell.name, check_steps=scores["run_id"].map(checks).astype(float))


def _joined(tables: Sequence[pd.DataFrame], scope: str, alpha: float) -> pd.DataFrame:
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True).drop(columns=["experiment", "model", "degraded"])
    table.insert(0, "scope", scope)
    table.insert(1, "alpha", alpha)
    return table


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a scope and detector: failures detected, leads, and false alarms in healthy runs.

    detected: share of failures with an alarm before their loss rose, with a 95 % interval: over cells
    (``inference.bca_interval``), or Wilson's, as ``interval`` says, under 10 cells with a failure and where all are
    alike. lead_steps: restricted mean, a miss or a late alarm counts as 0, over cells as well; median_lead_steps: of
    the detected ones. beyond_check: failures that are detected before the label's last reading without a rise: a
    shorter lead is only that a detector is read more often. false_alarms: of healthy runs, with Clopper-Pearson's
    interval; that and Wilson's take the runs of a cell as independent. per_million_steps: alarms of healthy runs, at
    most one each, over the steps watched.
    """
    rows = []
    keys = ["scope", "alpha", "detector", "kind"]
    for (scope, alpha, detector, kind), mine in scores.groupby(keys, sort=False, dropna=False):
        failed, healthy = mine[mine["fault"] != HEALTHY], mine[mine["fault"] == HEALTHY]
        by_cell = failed.groupby("cell", sort=False)
        counts = by_cell.size().to_numpy(float)
        low, high = bca_interval(by_cell["detected"].sum().to_numpy(float), counts)
        over_cells = bool(np.isfinite(low) and low < high)
        detected, alarms = int(failed["detected"].sum()), int((healthy["outcome"] == "false_alarm").sum())
        if not over_cells:
            low, high = wilson_interval(detected, len(failed))
        lead_low, lead_high = bca_interval(by_cell["lead"].sum().to_numpy(float), counts)
        false_low, false_high = clopper_pearson_interval(alarms, len(healthy))
        watched = healthy["alarm"].astype(float).fillna(healthy["reach"]).sum()
        rows.append(
            {
                "scope": scope,
                "alpha": alpha,
                "detector": detector,
                "kind": kind,
                "failures": len(failed),
                "cells_with_failures": len(counts),
                "detected": detected,
                "detected_share": detected / len(failed) if len(failed) else np.nan,
                "detected_low": low,
                "detected_high": high,
                "interval": "cells" if over_cells else "Wilson",
                "late": int((failed["outcome"] == "late").sum()),
                "missed": int((failed["outcome"] == "missed").sum()),
                "beyond_check": int((failed["lead"] > failed["check_steps"]).sum()),
                "lead_steps": failed["lead"].mean(),
                "lead_low": lead_low,
                "lead_high": lead_high,
                "median_lead_steps": failed.loc[failed["detected"], "lead"].median(),
                "healthy_runs": len(healthy),
                "false_alarms": alarms,
                "false_alarm_share": alarms / len(healthy) if len(healthy) else np.nan,
                "false_alarm_low": false_low,
                "false_alarm_high": false_high,
                "per_million_steps": 1e6 * alarms / watched if watched else np.nan,
            }
        )
    return pd.DataFrame(rows)
