"""The leaderboard: what a contest says of each detector, over seeds, with intervals and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from foreshock.analysis.detect.detection import Detector
from foreshock.analysis.detect.tracks.base import Charted
from foreshock.analysis.scores.contest import ALL_FAULTS, Contest
from foreshock.analysis.scores.costs import MonitorCost, detector_cost
from foreshock.analysis.scores.inference import (
    MIN_SEEDS,
    clopper_pearson_interval,
    false_alarm_bound,
    false_alarm_law,
    iqm,
    keeps_rate,
    restricted_mean_time,
    wilson_interval,
)
from foreshock.analysis.scores.outcome import relative_lead
from foreshock.analysis.scores.verdict import over_faults, under_one_fault

RANKED = ("detector", "baseline", "entrant", "external")
"""Kinds that compete; controls, and oracles that read the fault itself, stand beside them."""


def with_relative(scores: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """Adds ``relative``, ``scores.outcome.relative_lead`` over a baseline; NaN throughout where there is none."""
    alarms = scores[scores["detector"] == baseline].set_index("run_id")["alarm"]
    relative = np.full(len(scores), np.nan)
    for i, row in enumerate(scores.itertuples()):
        if row.run_id in alarms.index:
            alarm, other, divergence = (
                None if pd.isna(at) else int(at) for at in (row.alarm, alarms[row.run_id], row.divergence)
            )
            lead = relative_lead(alarm, other, onset=row.onset, divergence=divergence, reach=row.reach)
            relative[i] = np.nan if lead is None else lead
    return scores.assign(relative=relative)


def board(contest: Contest, scores: pd.DataFrame, costs: Mapping[str, MonitorCost] | None = None) -> pd.DataFrame:
    """The leaderboard of one contest: a row for each detector and fault, and one for all faults together.

    costs: by signal, its monitor and the share of a step that it takes. The rows of a fault rank detectors by their
    mean lead in steps, with intervals over seeds. Those of all faults rank them by the share of the possible lead, with
    intervals over faults and seeds, where ``scores.overall.MIN_FAULTS`` faults diverge, and not at all where fewer
    do. Intervals are conditional on the threshold; ``false_alarm_law`` is what its own luck adds. NaN under 10 seeds.
    ``baseline``: the best of the row's fault; ``relative_lead_steps`` and ``p_beats_baseline`` are against it.
    """
    rows = [_declined_row(contest, detector) for detector in contest.detectors.values() if detector.declined]
    if len(scores):
        healthy = by_detector(scores[scores["fault"] == "healthy"])
        faulty = scores[scores["fault"] != "healthy"]
        for fault in (ALL_FAULTS, *contest.experiment.faults):
            of_fault = faulty if fault == ALL_FAULTS else faulty[faulty["fault"] == fault]
            rows += _fault_rows(contest, fault, of_fault, healthy, costs or {})
    return pd.DataFrame(rows)


def by_detector(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return dict(tuple(scores.groupby("detector", sort=False)))


def _declined_row(contest: Contest, detector: Detector) -> dict[str, Any]:
    return {
        **contest.keys,
        "fault": ALL_FAULTS,
        "detector": detector.name,
        "kind": contest.kinds[detector.name],
        "declined": detector.declined,
    }


def _fault_rows(
    contest: Contest,
    fault: str,
    scores: pd.DataFrame,
    healthy: Mapping[str, pd.DataFrame],
    costs: Mapping[str, MonitorCost],
) -> list[dict[str, Any]]:
    of_detector = by_detector(scores)
    names = [name for name in contest.detectors if name in of_detector]
    if not names:
        return []
    competing = [i for i, name in enumerate(names) if contest.kinds[name] in RANKED]
    ranked = [i for i in competing if keeps_its_rate(contest, names[i], healthy)]
    verdict = (over_faults if fault == ALL_FAULTS else under_one_fault)(contest, scores, names, ranked)
    of_detector = by_detector(with_relative(scores, verdict.baseline))
    rows = []
    for i, name in enumerate(names):
        mine = of_detector[name]
        detected = int(mine["detected"].sum())
        detected_low, detected_high = wilson_interval(detected, len(mine))
        waited = mine[mine["outcome"] != "false_alarm"]
        outcomes = mine["outcome"].value_counts()
        rows.append(
            {
                **contest.keys,
                "fault": fault,
                "detector": name,
                "kind": contest.kinds[name],
                "runs": len(mine),
                "seeds": mine["seed"].nunique(),
                "diverged": int(mine["divergence"].notna().sum()),
                "degraded": int(mine["degraded"].sum()),
                **_healthy_columns(contest, name, healthy),
                "detected": detected / len(mine),
                "detected_low": detected_low,
                "detected_high": detected_high,
                "rmlt_steps": mine["lead"].mean(),
                "rmlt_low": verdict.lead_D2[i, 0],
                "rmlt_high": verdict.lead_D2[i, 1],
                "iqm_lead_steps": iqm(mine["lead"].dropna()),
                "share_of_possible_lead": verdict.share_D3[i, 0],
                "share_low": verdict.share_D3[i, 1],
                "share_high": verdict.share_D3[i, 2],
                "baseline": verdict.baseline,
                "relative_lead_steps": mine["relative"].mean(),
                "p_beats_baseline": verdict.p_D[i],
                "smallest_p": verdict.smallest_p if np.isfinite(verdict.p_D[i]) else np.nan,
                "size_over_threshold": np.nan if fault == ALL_FAULTS else _size(contest, name, mine),
                "delay_steps": np.nan if fault == ALL_FAULTS else _delay(waited, contest.experiment.horizon),
                "rank": verdict.rank_D3[i, 0],
                "rank_low": verdict.rank_D3[i, 1],
                "rank_high": verdict.rank_D3[i, 2],
                "possibly_best": i in verdict.best if np.isfinite(verdict.rank_D3[i, 0]) else None,
                **{outcome: int(outcomes.get(outcome, 0)) for outcome in ("late", "missed", "false_alarm")},
                "cost_share_of_step": detector_cost(contest.detectors[name].signals, costs),
                "exploratory": mine["seed"].nunique() < MIN_SEEDS or not healthy,
                "declined": None,
            }
        )
    return rows


def healthy_alarms(name: str, healthy: Mapping[str, pd.DataFrame]) -> tuple[int, int]:
    """In how many healthy test runs a detector alarmed, and of how many."""
    mine = healthy.get(name)
    return (0, 0) if mine is None else (int((mine["outcome"] == "false_alarm").sum()), len(mine))


def keeps_its_rate(contest: Contest, name: str, healthy: Mapping[str, pd.DataFrame]) -> bool:
    """Whether its healthy test runs leave it possible that a detector alarms in no more than alpha of them."""
    alarms, runs = healthy_alarms(name, healthy)
    if not runs:  # nothing was seen; a conformal threshold still promises it, nobody else does
        return contest.kinds[name] != "external" and contest.track.promises_rate
    return keeps_rate(alarms, runs, len(contest.detectors[name].maxima), contest.alpha)


def _delay(scores: pd.DataFrame, horizon: int) -> float:
    """Mean time from onset to alarm, restricted to what is left of the horizon; NaN without runs."""
    left = (horizon - scores["onset"].astype(float)).min()
    return restricted_mean_time(scores["delay"], scores["alarmed"], left) if len(scores) and left > 0 else np.nan


def _healthy_columns(contest: Contest, name: str, healthy: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What healthy test runs say of a detector, and what the threshold promised."""
    (alarms, runs), n = healthy_alarms(name, healthy), len(contest.detectors[name].maxima)
    low, high = clopper_pearson_interval(alarms, runs)
    law = false_alarm_law(n, contest.alpha) if n else (np.nan,) * 3
    by_prediction = contest.track.promises_rate and not isinstance(contest.track, Charted)
    return {
        "alpha": contest.alpha if n or by_prediction else np.nan,
        "calibration_runs": n,
        "alpha_supported": 1 / (n + 1) if n else np.nan,
        "threshold": contest.detectors[name].threshold,
        "healthy_alarms": alarms,
        "healthy_runs": runs,
        "false_alarm_low": low,
        "false_alarm_high": high,
        "false_alarm_law_low": law[1],
        "false_alarm_law_high": law[2],
        "false_alarm_bound": false_alarm_bound(n, contest.alpha) if n else np.nan,
    }


def _size(contest: Contest, name: str, scores: pd.DataFrame) -> float:
    """How far a fault stands above a detector's threshold: the largest reading in time over it, median over runs.

    In time is from onset to divergence, or to the run's end. NaN without charts, where a threshold is not above 0, and
    on a track whose thresholds are no scales.
    """
    detector = contest.detectors[name]
    limits = detector.limits()
    if not contest.track.thresholds_are_scales or not detector.charts or not all(limit > 0 for limit in limits):
        return np.nan
    sizes = []
    for row in scores.itertuples():
        end = np.inf if pd.isna(row.divergence) else row.divergence
        largest = [-np.inf]
        for (where, statistic), limit in zip(detector.charts[row.run_id], limits, strict=True):
            of_fault = statistic[(where >= row.onset) & (where < end)]
            largest.append(np.max(of_fault, initial=-np.inf, where=~np.isnan(of_fault)) / limit)
        sizes.append(max(largest))
    size = float(np.median(sizes)) if sizes else np.nan
    return size if size > -np.inf else np.nan
