"""The leaderboard: what a contest says of each detector, over seeds, with intervals and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.contest import ALL_FAULTS, Contest
from analysis.costs import detector_cost
from analysis.detection import Detector
from analysis.inference import (
    MIN_SEEDS,
    bca_interval,
    clopper_pearson_interval,
    confidence_set,
    false_alarm_bound,
    false_alarm_law,
    iqm,
    max_t_test,
    rank_intervals,
    restricted_mean_time,
    seed_mean,
    wilson_interval,
)

RANKED = ("detector", "entrant", "external")
"""Kinds that compete; controls, and oracles that are told the fault, stand beside them."""
IN_TIME = ("lead", "benign_alarm")


def _by_seed(scores: pd.DataFrame, names: Sequence[str], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of a column by seed, both (S, D); runs without a value count nothing."""
    table = scores[scores[column].notna()].pivot_table(
        index="seed", columns="detector", values=column, aggfunc=["sum", "count"], fill_value=0.0
    )
    seeds = sorted(scores["seed"].unique())
    return tuple(
        (table[what] if what in table else pd.DataFrame())
        .reindex(index=seeds, columns=names, fill_value=0.0)
        .to_numpy(float)
        for what in ("sum", "count")
    )


def _relative(scores: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Adds ``relative``: baseline's alarm minus the detector's, both at most the run's reach; NaN unless it diverges.

    An alarm before the onset counts as none, on either side. A run that was stopped because it diverged reaches to the
    horizon. Under a fault that does no harm there is nothing to be early for.
    """
    alarm = scores["alarm"].astype(float).where(scores["outcome"] != "false_alarm")
    restricted = alarm.fillna(np.inf).clip(upper=scores["reach"].astype(float))
    table = scores.assign(restricted=restricted)
    reference = table[table["detector"] == baseline].set_index("run_id")
    joined = table["run_id"].map(reference["restricted"])
    return table.assign(relative=(joined - restricted).where(table["lead"].notna()))


def board(one: Contest, scores: pd.DataFrame, costs: Mapping[str, tuple[str, float]] | None = None) -> pd.DataFrame:
    """The leaderboard of one contest: a row for each detector and fault, and one for all faults together.

    costs: by signal, its monitor and the share of a step that it takes. Intervals are over seeds, jointly across
    faults, and conditional on the threshold; ``false_alarm_law`` is what its own luck adds. NaN under 10 seeds.
    """
    rows = [_declined_row(one, detector) for detector in one.detectors.values() if detector.declined]
    if len(scores):
        scores = _relative(scores, one.baseline)
        healthy = _by_detector(scores[scores["fault"] == "healthy"])
        faulty = scores[scores["fault"] != "healthy"]
        for fault in (ALL_FAULTS, *one.experiment.faults):
            of_fault = faulty if fault == ALL_FAULTS else faulty[faulty["fault"] == fault]
            rows += _fault_rows(one, fault, of_fault, healthy, costs or {})
    return pd.DataFrame(rows)


def _by_detector(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return dict(tuple(scores.groupby("detector", sort=False)))


def _declined_row(one: Contest, detector: Detector) -> dict[str, Any]:
    return {
        **one.keys,
        "fault": ALL_FAULTS,
        "detector": detector.name,
        "kind": one.kinds[detector.name],
        "declined": detector.declined,
    }


def _fault_rows(
    one: Contest,
    fault: str,
    scores: pd.DataFrame,
    healthy: Mapping[str, pd.DataFrame],
    costs: Mapping[str, tuple[str, float]],
) -> list[dict[str, Any]]:
    of_detector = _by_detector(scores)
    names = [name for name in one.detectors if name in of_detector]
    if not names:
        return []
    totals_SD, counts_SD = _by_seed(scores, names, "lead")
    ranked = [i for i, name in enumerate(names) if one.kinds[name] in RANKED]
    # Who was not scored on all of these runs, or alarms in healthy ones more often than allowed, cannot be compared.
    whole = counts_SD.sum(0).max(initial=0.0)
    ranked = [i for i in ranked if counts_SD[:, i].sum() == whole > 0 and _keeps_rate(one, names[i], healthy)]
    ranks = dict(zip(ranked, rank_intervals(totals_SD[:, ranked], counts_SD[:, ranked]), strict=True)) if ranked else {}
    best = _possibly_best(totals_SD, counts_SD, ranked)
    p_values, smallest_p = _against_baseline(one, names, totals_SD, counts_SD, ranked)
    rows = []
    for i, name in enumerate(names):
        mine = of_detector[name]
        rank, low, high = ranks.get(i, (np.nan,) * 3)
        rmlt_low, rmlt_high = bca_interval(totals_SD[:, i], counts_SD[:, i])
        detected = int(mine["outcome"].isin(IN_TIME).sum())
        detected_low, detected_high = wilson_interval(detected, len(mine))
        waited = mine[mine["outcome"] != "false_alarm"]
        outcomes = mine["outcome"].value_counts()
        rows.append(
            {
                **one.keys,
                "fault": fault,
                "detector": name,
                "kind": one.kinds[name],
                "runs": len(mine),
                "seeds": mine["seed"].nunique(),
                "diverged": int(mine["divergence"].notna().sum()),
                "degraded": int(mine["degraded"].sum()),
                **_healthy_columns(one, name, healthy),
                "detected": detected / len(mine),
                "detected_low": detected_low,
                "detected_high": detected_high,
                "rmlt_steps": seed_mean(totals_SD[:, i], counts_SD[:, i]),
                "rmlt_low": rmlt_low,
                "rmlt_high": rmlt_high,
                "iqm_lead_steps": iqm(mine["lead"].dropna()),
                "normalised_lead": mine["normalised_lead"].mean(),
                "relative_lead_steps": mine["relative"].mean(),
                "p_beats_baseline": p_values.get(i, np.nan),
                "smallest_p": smallest_p if i in p_values else np.nan,
                "delay_steps": np.nan if fault == ALL_FAULTS else _delay(waited, one.experiment.horizon),
                "rank": rank,
                "rank_low": low,
                "rank_high": high,
                "possibly_best": i in best if i in ranks else None,
                **{outcome: int(outcomes.get(outcome, 0)) for outcome in ("late", "missed", "false_alarm")},
                "cost_share_of_step": detector_cost(one.detectors[name].signals, costs),
                "exploratory": mine["seed"].nunique() < MIN_SEEDS or not healthy,
                "declined": None,
            }
        )
    return rows


def _healthy_alarms(name: str, healthy: Mapping[str, pd.DataFrame]) -> tuple[int, int]:
    """In how many healthy test runs a detector alarmed, and of how many."""
    mine = healthy.get(name)
    return (0, 0) if mine is None else (int((mine["outcome"] == "false_alarm").sum()), len(mine))


def _keeps_rate(one: Contest, name: str, healthy: Mapping[str, pd.DataFrame]) -> bool:
    """Whether its healthy test runs leave it possible that a detector alarms in no more than alpha of them."""
    alarms, runs = _healthy_alarms(name, healthy)
    if not runs:  # nothing was seen; a conformal threshold still promises it, nobody else does
        return one.kinds[name] != "external" and one.track != "published"
    return clopper_pearson_interval(alarms, runs)[0] <= one.alpha


def _delay(scores: pd.DataFrame, horizon: int) -> float:
    """Mean time from onset to alarm, restricted to what is left of the horizon; NaN without runs."""
    left = (horizon - scores["onset"].astype(float)).min()
    return restricted_mean_time(scores["delay"], scores["detected"], left) if len(scores) and left > 0 else np.nan


def _healthy_columns(one: Contest, name: str, healthy: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What healthy test runs say of a detector, and what the threshold promised."""
    (alarms, runs), n = _healthy_alarms(name, healthy), len(one.detectors[name].maxima)
    low, high = clopper_pearson_interval(alarms, runs)
    law = false_alarm_law(n, one.alpha) if n else (np.nan,) * 3
    return {
        "alpha": one.alpha if n or one.track == "universal" else np.nan,
        "calibration_runs": n,
        "alpha_supported": 1 / (n + 1) if n else np.nan,
        "threshold": one.detectors[name].threshold,
        "healthy_alarms": alarms,
        "healthy_runs": runs,
        "false_alarm_low": low,
        "false_alarm_high": high,
        "false_alarm_law_low": law[1],
        "false_alarm_law_high": law[2],
        "false_alarm_bound": false_alarm_bound(n, one.alpha) if n else np.nan,
    }


def _possibly_best(totals_SD: np.ndarray, counts_SD: np.ndarray, ranked: Sequence[int]) -> set[int]:
    """The model confidence set over seeds' mean leads, of the ranked detectors."""
    if len(ranked) < 2:
        return set(ranked)
    some = counts_SD[:, ranked[0]] > 0
    losses = -totals_SD[some][:, ranked] / counts_SD[some][:, ranked]
    return {ranked[i] for i in confidence_set(losses)}


def _against_baseline(
    one: Contest, names: Sequence[str], totals_SD: np.ndarray, counts_SD: np.ndarray, ranked: Sequence[int]
) -> tuple[dict[int, float], float]:
    """By column, max-T adjusted p that a restricted lead is larger than the baseline's; the smallest there is."""
    others = [i for i in ranked if names[i] != one.baseline]
    if one.baseline not in names or names.index(one.baseline) not in ranked or not others:
        return {}, np.nan
    base = names.index(one.baseline)
    some = counts_SD[:, base] > 0
    if some.sum() < 2:
        return {}, np.nan
    means = totals_SD[some] / np.maximum(counts_SD[some], 1)
    test = max_t_test(means[:, others] - means[:, [base]])
    return dict(zip(others, test.p_adjusted_D.tolist(), strict=True)), test.smallest_p
