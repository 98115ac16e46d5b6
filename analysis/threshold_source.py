"""What sets a signal's threshold: which calibration run, at which step, and what it would be without a run's start.

    python -m analysis.threshold_source runs=results/reference_set/moe signal=routing_entropy fault=ramp

runs=DIR            a folder with ``experiment.json`` and its runs, such as a reduced one
signal=NAME         of the runs
fault=NAME          whose alarms are shown, at both thresholds
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from foreshock.analysis.detect.alarms import chart_statistics, conformal_rank, first_alarm, fitted
from foreshock.analysis.detect.bands import DeclinedSignal
from foreshock.analysis.detect.detection import Chart, Detection
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.runs.load import load
from foreshock.analysis.scores.outcome import score
from foreshock.analysis.scores.table import median_step
from foreshock.experiments.trace import TraceError
from foreshock.experiments.usage import fail, misused, show_help


def charts(experiment: Experiment, signal: str) -> dict[str, Chart]:
    """By run id, positions and statistic of one signal on the reference track, of every run but the reference ones."""
    sides, rule = Detection(experiment).sides(signal), make_rule(**experiment.index["rule"])
    rules = fitted(rule, [sides[run.trace.run_id].series for run in experiment.of("reference")])
    runs = [run.trace.run_id for run in experiment.of("calibration", "test", "faulty")]
    statistics = chart_statistics([sides[run].series for run in runs], rules)
    return {run: (sides[run].positions, statistic) for run, statistic in zip(runs, statistics, strict=True)}


def peaks(experiment: Experiment, of_run: Mapping[str, Chart], after: int = 0) -> pd.DataFrame:
    """seed, largest, position: of each calibration run its largest statistic from a position on; largest first.

    sets_threshold marks the run whose largest statistic is the conformal threshold. Raises ValueError where a run has
    no sample from there on.
    """
    rows = []
    for run in experiment.of("calibration"):
        where, statistic = of_run[run.trace.run_id]
        late = np.where((where >= after) & ~np.isnan(statistic), statistic, -np.inf)
        if np.isneginf(late).all():
            raise ValueError(f"run {run.trace.run_id} has no sample from {after} on")
        rows.append((run.seed, late.max(), int(where[late.argmax()])))
    table = pd.DataFrame(rows, columns=["seed", "largest", "position"]).sort_values(
        "largest", ascending=False, ignore_index=True
    )
    return table.assign(sets_threshold=table.index == len(table) - conformal_rank(len(table), experiment.alpha))


def alarms(experiment: Experiment, of_run: Mapping[str, Chart], fault: str, threshold: float) -> dict[str, float]:
    """runs, in_time (from onset on, before divergence), and median alarm and divergence of a fault's runs."""
    runs = experiment.of("faulty", fault=fault)
    if not runs:
        raise ValueError(f"fault={fault!r} is not allowed: one of {', '.join(experiment.faults)}")
    steps = [first_alarm(of_run[run.trace.run_id][1], of_run[run.trace.run_id][0], threshold) for run in runs]
    outcomes = [
        score(alarm=step, onset=run.onset, divergence=run.divergence, horizon=experiment.horizon).outcome
        for run, step in zip(runs, steps, strict=True)
    ]
    return {
        "threshold": threshold,
        "runs": len(runs),
        "in_time": sum(outcome in ("lead", "benign_alarm") for outcome in outcomes),
        "median_alarm": median_step(steps),
        "median_divergence": median_step([run.divergence for run in runs]),
    }


def threshold_source(experiment: Experiment, signal: str, fault: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``peaks`` over whole calibration runs, and the fault's ``alarms`` at two thresholds.

    One row is at the threshold that scoring uses, one at what it would be if calibration runs counted from the fault's
    onset on alone, with the position at which it is reached.
    """
    of_run = charts(experiment, signal)
    whole, rows = peaks(experiment, of_run), []
    onset = max((run.onset for run in experiment.of("faulty", fault=fault) if run.onset is not None), default=0)
    for counted, table in (("whole runs", whole), (f"from {onset} on", peaks(experiment, of_run, onset))):
        source = table[table["sets_threshold"]].iloc[0]
        at = {"calibration": counted, "set_by_seed": source["seed"], "set_at": source["position"]}
        rows.append(at | alarms(experiment, of_run, fault, float(source["largest"])))
    return whole, pd.DataFrame(rows)


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) != {"runs", "signal", "fault"} or len(given) != len(arguments):
        misused("python -m analysis.threshold_source runs=DIR signal=NAME fault=NAME")
    folder = Path(given["runs"])
    try:
        whole, rows = threshold_source(load(folder, folder), given["signal"], given["fault"])
    except (ValueError, OSError, DeclinedSignal, TraceError) as error:
        fail(str(error))
    print(f"{given['signal']}: where calibration runs reach their largest statistic")
    print(whole.to_string(index=False, float_format="{:.2f}".format))
    print(f"\n{given['fault']}: alarms")
    print(rows.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main(sys.argv[1:])
