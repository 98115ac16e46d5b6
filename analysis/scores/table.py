"""The lead-time table: one row a fault and detector, and one row a run behind it."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from analysis.detect.detection import Detector
from analysis.runs.experiment import Experiment, ScoredRun
from analysis.scores.contest import Contest
from analysis.scores.inference import keeps_rate
from analysis.scores.outcome import IN_TIME, OUTCOMES, best_baseline, relative_lead, restricted_mean_lead


def median_step(steps: list[int | None]) -> float:
    """Median in which "never" counts as later than everything; NaN where the median itself is never."""
    ordered = sorted(np.inf if step is None else step for step in steps)
    if not ordered:
        return float("nan")
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float("nan") if np.isinf(high) else (low + high) / 2


def run_table(contest: Contest) -> pd.DataFrame:
    """Every faulty and healthy test run under every detector: alarm, divergence, outcome, restricted lead.

    Columns named after steps hold positions on the experiment's axis; ``in_unit`` names them after it.
    """
    experiment, rows = contest.experiment, []
    for detector in contest.own.values():
        if detector.declined:
            continue
        for run in experiment.of("faulty", "test"):
            result = contest.score(detector, run)
            rows.append(
                {
                    "model": experiment.model,
                    "fault": run.fault or "healthy",
                    "detector": detector.name,
                    "seed": run.seed,
                    "run_id": run.trace.run_id,
                    "alarm_step": detector.alarms[run.trace.run_id],
                    "divergence_step": run.divergence,
                    "degraded": run.degraded,
                    "end_reason": run.trace.end_reason,
                    "outcome": result.outcome,
                    "restricted_lead_steps": result.restricted_lead_steps,
                }
            )
    table = pd.DataFrame(rows)
    for column in ("alarm_step", "divergence_step", "restricted_lead_steps"):
        table[column] = table[column].astype("Int64")
    return table


def _relative(detector: Detector, baseline: Detector | None, run: ScoredRun) -> float:
    if baseline is None:
        return np.nan
    alarm, other = detector.alarms[run.trace.run_id], baseline.alarms[run.trace.run_id]
    lead = relative_lead(alarm, other, onset=run.onset, divergence=run.divergence, reach=run.horizon)
    return np.nan if lead is None else lead


def _healthy_alarms(experiment: Experiment, detector: Detector) -> tuple[int, int]:
    """In how many healthy test runs a detector alarms, and of how many."""
    alarms = [detector.alarms[run.trace.run_id] for run in experiment.of("test")]
    return sum(alarm is not None for alarm in alarms), len(alarms)


def _keeps_rate(experiment: Experiment, detector: Detector) -> bool:
    alarms, runs = _healthy_alarms(experiment, detector)
    return not runs or keeps_rate(alarms, runs, len(detector.maxima), experiment.alpha)


def from_onset(alarm: int | None, onset: int) -> int | None:
    """An alarm; None where it is raised before the onset, which no fault can have caused."""
    return None if alarm is None or alarm < onset else alarm


def lead_table(contest: Contest) -> pd.DataFrame:
    """One row a fault and detector, in the order of the median first alarm.

    threshold: at false-alarm rate ``alpha``, of the chart where a detector has one signal; of several it is a number on
    the scale that they share (``detect.joint``), in standard deviations of a member's largest statistics, and may be
    below 0; median_alarm_step, median_divergence_step: NaN where the median run has none;
    median_alarm_from_onset_step: the same of alarms from onset on, one before it counting as none; rmlt_steps: mean
    restricted lead over diverging runs, a miss counting 0; relative_lead_steps: over the best ``baseline`` of the fault
    (of those that keep their false-alarm rate, where any does), mean over diverging runs
    (``scores.outcome.relative_lead``); detected: share of runs with an alarm in time (``scores.outcome.IN_TIME``);
    healthy_test_alarms: alarms in healthy test runs, of how many; the outcome columns count runs. Columns named after
    steps hold positions on the experiment's axis; ``in_unit`` names them after it.
    """
    experiment = contest.experiment
    baselines = [contest.detectors[name] for name in contest.baselines]
    named = set(experiment.named_detectors)
    keeping = [baseline.name for baseline in baselines if _keeps_rate(experiment, baseline)]
    rows = []
    for fault in experiment.faults:
        runs = experiment.of("faulty", fault=fault)
        leads = {b.name: restricted_mean_lead([contest.score(b, run) for run in runs]) for b in baselines}
        best = best_baseline(leads, keeping)
        for detector in contest.own.values():
            row = {
                "model": experiment.model,
                "fault": fault,
                "detector": detector.name,
                "kind": "detector" if detector.name in named else "signal",
            }
            if detector.declined:
                rows.append(row | {"declined": detector.declined})
                continue
            scores = [contest.score(detector, run) for run in runs]
            alarms = [detector.alarms[run.trace.run_id] for run in runs]
            in_fault = [from_onset(alarm, run.onset) for alarm, run in zip(alarms, runs, strict=True)]
            healthy_alarms, healthy_runs = _healthy_alarms(experiment, detector)
            relative = [_relative(detector, contest.detectors.get(best), run) for run in runs]
            detected = [s.outcome in IN_TIME for s in scores]
            rows.append(
                row
                | {
                    "runs": len(runs),
                    "median_alarm_step": median_step(alarms),
                    "median_alarm_from_onset_step": median_step(in_fault),
                    "median_divergence_step": median_step([run.divergence for run in runs]),
                    "rmlt_steps": restricted_mean_lead(scores),
                    "baseline": best,
                    "relative_lead_steps": float(pd.Series(relative, dtype=float).mean()),
                    "detected": float(np.mean(detected)),
                    **{outcome: sum(s.outcome == outcome for s in scores) for outcome in OUTCOMES},
                    "healthy_test_alarms": healthy_alarms,
                    "healthy_test_runs": healthy_runs,
                    "threshold": detector.threshold,
                    "alpha": experiment.alpha,
                    "declined": None,
                }
            )
    table = pd.DataFrame(rows)
    table["_order"] = table["fault"].map({fault: i for i, fault in enumerate(experiment.faults)})
    return table.sort_values(["_order", "kind", "median_alarm_step"], na_position="last").drop(columns="_order")


def in_unit(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The table with its step columns named after the axis: ``rmlt_steps`` becomes ``rmlt_tokens``."""
    return table.rename(columns=lambda name: re.sub(r"_steps?$", f"_{axis}", name) if axis != "steps" else name)
