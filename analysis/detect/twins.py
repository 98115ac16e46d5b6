"""Thresholds out of seed twins that are few: leave-one-out inside a cell, and pooled over standardised cells.

M_i is the largest statistic of run i (its path maximum). A run that is judged never sets its own threshold.

**In a cell**: the threshold of run i is the conformal one (``alarms.conformal_threshold``) of the healthy twins other
than i. If run i, were it healthy, and those twins are exchangeable, it rises above with probability at most alpha,
whatever the autocorrelation: the finite-sample statement of split conformal, run by run. A band that uses no twin
(the self track) leaves it exact. Each run left out has its promise on average; n of them share twins, so their
alarms are not independent. n others support alpha = 1 / (n + 1): of a cell of 5, 0.2.

**Pooled**: S_i = M_i - the median of M over the healthy twins other than i, on one scale for all cells. The threshold
for the runs of a cell is the 1 - alpha quantile of the S of all other cells, a cell weighing 1 / (K + 1), its runs
alike, the rest of the weight at infinity: hierarchical conformal prediction (Lee, Barber & Willett,
arXiv:2306.06342). A healthy run of a new cell then rises above with probability at most alpha, on average over cells,
if cells are exchangeable and the runs in each. It promises nothing for one given cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from foreshock.analysis.detect.alarms import conformal_threshold

MIN_TWINS = 2
"""Other healthy twins that the standardisation of a run needs."""


def leave_one_out(healthy: Mapping[str, float], runs: Sequence[str], alpha: float) -> dict[str, float]:
    """By run id the threshold that the other healthy twins set; runs whose twins cannot support alpha are left out.

    healthy: the path maxima of the cell's healthy runs. Raises ValueError for an alpha outside (0, 1), and on NaN.
    """
    thresholds = {}
    for run in runs:
        others = [maximum for twin, maximum in healthy.items() if twin != run]
        if (len(others) + 1) * alpha >= 1 - 1e-9:
            thresholds[run] = conformal_threshold(others, alpha)
    return thresholds


def centres(healthy: Mapping[str, float], runs: Sequence[str]) -> dict[str, float]:
    """By run id the median path maximum of the other healthy twins.

    Runs with fewer than ``MIN_TWINS`` of them are left out, and those whose median is not finite.
    """
    known = {}
    for run in runs:
        others = [maximum for twin, maximum in healthy.items() if twin != run]
        if len(others) >= MIN_TWINS and np.isfinite(centre := np.median(others)):
            known[run] = float(centre)
    return known


def hierarchical_threshold(groups: Sequence[Sequence[float]], alpha: float) -> float:
    """The smallest score s with sum over K groups of (share of the group at most s) / (K + 1) >= 1 - alpha.

    Raises ValueError where K is too small for alpha, naming the smallest alpha, 1 / (K + 1); and on an empty group.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1")
    if any(len(group) == 0 for group in groups):
        raise ValueError("a cell has no healthy run: it sets no threshold")
    count = len(groups)
    if (count + 1) * alpha < 1 - 1e-9:
        raise ValueError(f"{count} other cells cannot support alpha={alpha}: the smallest is {1 / (count + 1):.4g}")
    scores = np.concatenate([np.asarray(group, float) for group in groups])
    weights = np.concatenate([np.full(len(group), 1 / (len(group) * (count + 1))) for group in groups])
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[order]) >= 1 - alpha - 1e-12
    return float(scores[order][reached.argmax()])


def pooled_thresholds(
    cells: Mapping[str, Mapping[str, float]], runs: Mapping[str, Sequence[str]], alpha: float
) -> dict[str, float]:
    """By run id its threshold at alpha, on the statistic's own scale: its twins' centre, and what other cells add.

    cells: by cell, the path maxima of its healthy runs; runs: by cell, those that are judged. A run without enough
    twins is left out. Raises ValueError as ``hierarchical_threshold`` does.
    """
    standardised: dict[str, list[float]] = {}
    for cell, healthy in cells.items():
        scores = [healthy[run] - centre for run, centre in centres(healthy, list(healthy)).items()]
        if scores:
            standardised[cell] = scores
    thresholds: dict[str, float] = {}
    for cell, judged in runs.items():
        others = [scores for other, scores in standardised.items() if other != cell]
        known = centres(cells[cell], judged)
        if known:
            limit = hierarchical_threshold(others, alpha)
            thresholds |= {run: centre + limit for run, centre in known.items()}
    return thresholds
