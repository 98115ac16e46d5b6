"""What seeds, and faults where there are enough, say of each detector's lead: intervals, ranks, tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.inference import bca_interval, confidence_set, max_t_test, pooled, rank_intervals
from foreshock.analysis.scores.outcome import best_baseline
from foreshock.analysis.scores.overall import MIN_FAULTS, Shares, fault_weights, overall


def by_seed(
    scores: pd.DataFrame, names: Sequence[str], column: str, seeds: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of a column by seed, both (S, D); runs without a value count nothing. seeds: all by default."""
    table = scores[scores[column].notna()].pivot_table(
        index="seed", columns="detector", values=column, aggfunc=["sum", "count"], fill_value=0.0
    )
    seeds = sorted(scores["seed"].unique()) if seeds is None else seeds
    return tuple(
        (table[what] if what in table else pd.DataFrame())
        .reindex(index=seeds, columns=names, fill_value=0.0)
        .to_numpy(float)
        for what in ("sum", "count")
    )


@dataclass
class Verdict:
    """What the rows of one fault, or of all, say of D detectors: NaN where it cannot be said.

    lead_D2: ends of the interval of the mean lead in steps; share_D3, rank_D3: value and interval; best: columns that
    are possibly best; baseline: the best one; p_D: max-T adjusted, of a lead no larger than that baseline's.
    """

    lead_D2: np.ndarray
    share_D3: np.ndarray
    rank_D3: np.ndarray
    best: set[int] = field(default_factory=set)
    baseline: str | None = None
    p_D: np.ndarray = field(default_factory=lambda: np.empty(0))
    smallest_p: float = np.nan

    @classmethod
    def nothing(cls, detectors: int) -> Verdict:
        lead_D2, share_D3, rank_D3 = (np.full((detectors, ends), np.nan) for ends in (2, 3, 3))
        return cls(lead_D2, share_D3, rank_D3, p_D=np.full(detectors, np.nan))

    def test_against(
        self, baselines: Sequence[str], means_SD: np.ndarray, names: Sequence[str], ranked: Sequence[int]
    ) -> None:
        """Fills in p against the best of the baselines, which are not tested themselves; NaN rows had no run."""
        base = names.index(self.baseline) if self.baseline in names else None
        others = [i for i in ranked if names[i] not in baselines]
        if base is None or base not in ranked or not others:
            return
        differences_SD = means_SD[:, others] - means_SD[:, [base]]
        differences_SD = differences_SD[np.isfinite(differences_SD).all(axis=1)]
        if len(differences_SD) < 2:
            return
        test = max_t_test(differences_SD)
        self.p_D[others], self.smallest_p = test.p_adjusted_D, test.smallest_p


def _best_of(baselines: Sequence[str], leads: pd.Series, names: Sequence[str], ranked: Sequence[int]) -> str | None:
    """The best baseline; one that is not ranked has no p, so it is the best only where none is ranked."""
    known = {name: float(leads[name]) for name in baselines if name in leads}
    return best_baseline(known, {names[i] for i in ranked})


def under_one_fault(contest: Contest, scores: pd.DataFrame, names: Sequence[str], ranked: Sequence[int]) -> Verdict:
    """Leads in steps, over seeds."""
    totals_SD, counts_SD = by_seed(scores, names, "lead")
    verdict = Verdict.nothing(len(names))
    verdict.lead_D2[:] = [bca_interval(totals_SD[:, i], counts_SD[:, i]) for i in range(len(names))]
    verdict.share_D3[:, 0] = scores.groupby("detector")["share_of_possible_lead"].mean().reindex(names)
    # Who was not scored on all of these runs cannot be compared.
    ranked = [i for i in ranked if counts_SD[:, i].sum() == counts_SD.sum(0).max(initial=0.0) > 0]
    leads = scores.groupby("detector")["lead"].mean()
    verdict.baseline = _best_of(contest.baselines, leads, names, ranked)
    if not ranked:
        return verdict
    verdict.rank_D3[ranked] = rank_intervals(totals_SD[:, ranked], counts_SD[:, ranked])
    means_SD = pooled(totals_SD, counts_SD)
    some = counts_SD[:, ranked[0]] > 0
    verdict.best = {ranked[i] for i in confidence_set(-means_SD[some][:, ranked])} if len(ranked) > 1 else set(ranked)
    verdict.test_against(contest.baselines, means_SD, names, ranked)
    return verdict


def over_faults(contest: Contest, scores: pd.DataFrame, names: Sequence[str], ranked: Sequence[int]) -> Verdict:
    """Shares of the possible lead, over faults and seeds; no more than the shares under ``MIN_FAULTS`` faults."""
    verdict = Verdict.nothing(len(names))
    faults = list(dict.fromkeys(scores.loc[scores["lead"].notna(), "fault"]))
    if not faults:
        return verdict
    seeds = sorted(scores["seed"].unique())
    parts = [by_seed(scores[scores["fault"] == fault], names, "share_of_possible_lead", seeds) for fault in faults]
    weights = fault_weights([contest.experiment.fault_families[fault] for fault in faults])
    totals_FSD, counts_FSD = (np.stack(part) for part in zip(*parts, strict=True))
    shares = Shares(totals_FSD, counts_FSD, weights)
    verdict.share_D3[:, 0] = shares.mean_D()
    counts_D = shares.counts_FSD.sum(axis=(0, 1))
    ranked = [i for i in ranked if counts_D[i] == counts_D.max()]
    verdict.baseline = _best_of(contest.baselines, pd.Series(verdict.share_D3[:, 0], names), names, ranked)
    if len(faults) < MIN_FAULTS or not ranked:
        return verdict
    ranking = overall(Shares(shares.totals_FSD[..., ranked], shares.counts_FSD[..., ranked], weights))
    verdict.share_D3[ranked], verdict.rank_D3[ranked] = ranking.share_D3, ranking.rank_D3
    verdict.best = {ranked[i] for i in ranking.best}
    verdict.test_against(contest.baselines, shares.by_seed_SD(), names, ranked)
    return verdict
