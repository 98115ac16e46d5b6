"""Attention's laws in cases that are judged each by itself, by the number that the noise prediction gives.

A case is a set of runs that differ in their seed alone. Its threshold is that of the ``universal`` track
(``detect.tracks.universal_threshold``), Bonferroni over every reading of every law, layer and head of one run: no
healthy run sets it, so none of the cases needs another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from foreshock.analysis.detect.bands import finite_or_inf
from foreshock.analysis.detect.tracks.universal import universal_threshold
from foreshock.analysis.runs.align import hold
from foreshock.analysis.runs.load import read_runs
from foreshock.experiments.trace import Trace

ALPHAS = {"5pct": 0.05, "01pct": 0.001}
"""False-alarm rates of a run, by the end of the columns' names."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ALL_LAWS, ALL_CASES = "all", "all healthy"


def laws_of(run: Trace, laws: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """By law, its readings in a run, every layer and head a column, by step; NaN where the prediction was declined.

    laws: name -> signal. A run whose monitor predicts no noise at all has no reading of a law: an empty table.
    """
    readings = {}
    for name, signal in laws.items():
        series = run.signals.get(signal)
        values = np.empty((0, 1)) if series is None else finite_or_inf(hold(series, "steps", series.steps))
        steps: Any = [] if series is None else series.steps
        readings[name] = pd.DataFrame(values.reshape(len(values), int(np.prod(values.shape[1:]))), index=steps)
    return readings


def case_rows(runs: Sequence[Trace], laws: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each law and one for all of them: how their ratios lie, the thresholds, and which runs alarm.

    All laws of a run share its thresholds, one a false-alarm rate; an alarm is a ratio strictly above. Alarm steps are
    those at 5 %, NaN where no run alarms; the median takes a run without alarm as infinitely late.
    """
    readings = [laws_of(run, laws) for run in runs]
    looks = max(sum(table.size for table in run.values()) for run in readings)
    thresholds = {end: universal_threshold(max(1, looks), alpha) for end, alpha in ALPHAS.items()}
    wanted = {name: [[run[name]] for run in readings] for name in laws}
    wanted[ALL_LAWS] = [list(run.values()) for run in readings]
    return [{"law": name, **_row(tables, thresholds)} for name, tables in wanted.items()]


def _row(runs: Sequence[Sequence[pd.DataFrame]], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """The row of some laws. runs: of each run, a table of readings a law."""
    of_run = [np.concatenate([table.to_numpy().ravel() for table in tables]) for tables in runs]
    ratios = np.concatenate(of_run)
    known = ratios[~np.isnan(ratios)]
    row = {
        "runs": len(runs),
        "readings": len(ratios),
        "declined_share": 1.0 - len(known) / len(ratios) if len(ratios) else 1.0,
        "rms": _rms(known),
        "rms_lowest_run": min(map(_rms, of_run)),
        "rms_highest_run": max(map(_rms, of_run)),
        "largest": known.max(initial=-np.inf) if len(known) else np.nan,
    }
    row |= {
        f"q{q:.0%}".rstrip("%"): np.quantile(known, q, method="inverted_cdf") if len(known) else np.nan
        for q in QUANTILES
    }
    for end, threshold in thresholds.items():
        row |= {f"threshold_{end}": threshold, f"alarms_{end}": sum((ratios > threshold).any() for ratios in of_run)}
    alarms = [_first_step_above(tables, thresholds["5pct"]) for tables in runs]
    finite = [step for step in alarms if np.isfinite(step)]
    row["median_alarm_step"] = np.median(alarms) if np.isfinite(np.median(alarms)) else np.nan
    row["latest_alarm_step"] = max(finite, default=np.nan)
    return row


def _rms(ratios: np.ndarray) -> float:
    """Root mean square of the known ratios; NaN where there is none."""
    known = ratios[~np.isnan(ratios)]
    return float(np.sqrt(np.square(known).mean())) if len(known) else np.nan


def _first_step_above(tables: Sequence[pd.DataFrame], threshold: float) -> float:
    """The first step with a ratio above the threshold in any table; Inf where there is none."""
    steps = [table.index[(table > threshold).any(axis=1)] for table in tables]
    return min((above[0] for above in steps if len(above)), default=np.inf)


def case_table(index: Mapping[str, Any], runs: Path) -> pd.DataFrame:
    """``zoo.csv``: the rows of every case, and totals over the healthy ones. index: ``experiment.json``'s content.

    Raises TraceError where a run is missing, unfinished or damaged.
    """
    experiment, rows, healthy = index["experiment"], [], []
    for case, settings in experiment["cases"].items():
        of_case = read_runs(runs, [cell["run_id"] for cell in index["runs"] if cell["fault"] == case])
        if not of_case:
            continue
        of_laws = case_rows(of_case, experiment["laws"])
        sound = all(run.onset is None for run in of_case)
        rows += [{"case": case, "label": settings.get("label", case), "healthy": sound, **row} for row in of_laws]
        healthy += of_case if sound else []
    table = pd.DataFrame(rows)
    return pd.concat([table, totals(table, healthy, experiment["laws"])], ignore_index=True)


def totals(table: pd.DataFrame, healthy: Sequence[Trace], laws: Mapping[str, str]) -> pd.DataFrame:
    """The rows of all healthy runs together; alarms are counted at each case's own thresholds, so none is given."""
    if not healthy:
        return table.iloc[:0]
    rows = pd.DataFrame(case_rows(healthy, laws)).assign(case=ALL_CASES, label=ALL_CASES, healthy=True)
    counted = table[table["healthy"]].groupby("law")[[f"alarms_{end}" for end in ALPHAS]].sum()
    for end in ALPHAS:
        rows[f"alarms_{end}"] = rows["law"].map(counted[f"alarms_{end}"])
        rows[f"threshold_{end}"] = np.nan
    return rows.assign(median_alarm_step=np.nan, latest_alarm_step=np.nan)[table.columns]
