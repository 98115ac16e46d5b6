"""The lead-time table of a report: one row a fault and detector, and one row a run behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from foreshock.analysis.scores.contest import Contest, run_scores
from foreshock.analysis.scores.leaderboard import by_detector, healthy_alarms, keeps_its_rate, with_relative
from foreshock.analysis.scores.outcome import OUTCOMES, best_baseline

RUN_COLUMNS = {
    "model": "model",
    "fault": "fault",
    "detector": "detector",
    "seed": "seed",
    "run_id": "run_id",
    "alarm": "alarm_step",
    "divergence": "divergence_step",
    "degraded": "degraded",
    "end_reason": "end_reason",
    "outcome": "outcome",
    "lead": "restricted_lead_steps",
}
"""What a report's ``runs.csv`` calls the columns of ``scores.contest.run_scores``."""


def median_step(steps: Iterable[int | None]) -> float:
    """Median in which "never" counts as later than everything; NaN where the median itself is never."""
    ordered: list[Any] = sorted(np.inf if pd.isna(step) else step for step in steps)
    if not ordered:
        return float("nan")
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float("nan") if np.isinf(high) else (low + high) / 2


def own_scores(contest: Contest) -> pd.DataFrame:
    """``run_scores`` of the experiment's detectors and single signals, without controls and entrants."""
    scores = run_scores(contest)
    return scores[scores["detector"].isin(contest.own)]


def run_table(contest: Contest) -> pd.DataFrame:
    """Every faulty and healthy test run under every detector: alarm, divergence, outcome, restricted lead.

    Columns named after steps hold positions on the experiment's axis; ``in_unit`` names them after it.
    """
    ends = {run.trace.run_id: run.trace.end_reason for run in contest.scored}
    scores = own_scores(contest)
    table = scores.assign(end_reason=scores["run_id"].map(ends))[list(RUN_COLUMNS)].rename(columns=RUN_COLUMNS)
    return table.astype({"restricted_lead_steps": "Int64"})


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
    scores = own_scores(contest)
    healthy = by_detector(scores[scores["fault"] == "healthy"])
    keeping = [name for name in contest.baselines if keeps_its_rate(contest, name, healthy)]
    named, rows = contest.experiment.named_detectors, []
    for fault in contest.experiment.faults:
        of_fault = scores[scores["fault"] == fault]
        leads = of_fault.groupby("detector")["lead"].mean()
        best = best_baseline({name: float(leads[name]) for name in contest.baselines if name in leads}, keeping)
        of_detector = by_detector(with_relative(of_fault, best))
        for name, detector in contest.own.items():
            row = {"model": contest.experiment.model, "fault": fault, "detector": name}
            row["kind"] = "detector" if name in named else "signal"
            if detector.declined:
                rows.append(row | {"declined": detector.declined})
                continue
            runs, outcomes = of_detector[name], of_detector[name]["outcome"].value_counts()
            alarms, healthy_runs = healthy_alarms(name, healthy)
            rows.append(
                row
                | {
                    "runs": len(runs),
                    "median_alarm_step": median_step(runs["alarm"]),
                    "median_alarm_from_onset_step": median_step(runs["alarm"].where(runs["alarmed"])),
                    "median_divergence_step": median_step(runs["divergence"]),
                    "rmlt_steps": runs["lead"].mean(),
                    "baseline": best,
                    "relative_lead_steps": runs["relative"].mean(),
                    "detected": runs["detected"].mean(),
                    **{outcome: int(outcomes.get(outcome, 0)) for outcome in OUTCOMES},
                    "healthy_test_alarms": alarms,
                    "healthy_test_runs": healthy_runs,
                    "threshold": detector.threshold,
                    "alpha": contest.alpha,
                    "declined": None,
                }
            )
    table = pd.DataFrame(rows)
    table["_order"] = table["fault"].map({fault: i for i, fault in enumerate(contest.experiment.faults)})
    return table.sort_values(["_order", "kind", "median_alarm_step"], na_position="last").drop(columns="_order")


def in_unit(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The table with its step columns named after the axis: ``rmlt_steps`` becomes ``rmlt_tokens``."""
    return table.rename(columns=lambda name: re.sub(r"_steps?$", f"_{axis}", name) if axis != "steps" else name)
