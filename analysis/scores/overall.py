"""One number over many faults: the share of the possible lead, with what faults and seeds leave open about it.

A share is lead / (divergence - onset) of a run, 0 for a miss. Faults are weighted equally within a family, families
equally; families of one fault are pooled. Under ``MIN_FAULTS`` diverging faults a ranking says which faults were
chosen, so there is none. Suffixes name axes: F faults, S seeds, D detectors, B bootstrap replicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from foreshock.analysis.scores.inference import CHUNK, CONFIDENCE, MIN_SEEDS, RESAMPLES, expanded, pooled, ranks

MIN_FAULTS = 8
"""Diverging faults that an overall rank, its interval and its confidence set need."""

POOL = "families of one fault"


def fault_weights(families: Sequence[str]) -> np.ndarray:
    """(F,) weights, sum 1, of faults of these families: equal within a family, families equal, single ones pooled."""
    sizes = Counter(families)
    pools = [family if sizes[family] > 1 else POOL for family in families]
    members = Counter(pools)
    return np.array([1 / (len(members) * members[pool]) for pool in pools])


@dataclass(frozen=True)
class Shares:
    """totals_FSD: sums of shares over a fault's diverging runs of a seed; counts_FSD: how many; weights_F: sum 1."""

    totals_FSD: np.ndarray
    counts_FSD: np.ndarray
    weights_F: np.ndarray

    def mean_D(self) -> np.ndarray:
        """The weighted mean over faults of each fault's mean share; NaN where a detector has no run of some fault."""
        means_FD = pooled(self.totals_FSD.sum(axis=1), self.counts_FSD.sum(axis=1))
        return self.weights_F @ means_FD

    def by_seed_SD(self) -> np.ndarray:
        """Each seed's weighted mean over the faults that diverge under it; NaN where none does."""
        weights = self.weights_F[:, None, None] * (self.counts_FSD > 0)
        means = pooled(self.totals_FSD, self.counts_FSD, empty=0.0)
        return pooled((weights * means).sum(axis=0), weights.sum(axis=0))

    def replicates_BD(self, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
        """``mean_D`` of resampled faults and, independently, resampled seeds: the pigeonhole bootstrap (Owen 2007).

        One draw serves all detectors; a seed is drawn with its runs of every fault, as runs of one seed share data and
        start. A drawn fault brings its weight. A fault without runs in a draw keeps its mean. Variances come out right
        or somewhat too large, whatever faults and seeds have in common.
        """
        generator = np.random.default_rng(seed)
        F, S, D = self.totals_FSD.shape
        point_FD = pooled(self.totals_FSD.sum(axis=1), self.counts_FSD.sum(axis=1))
        by_seed = [np.moveaxis(part, 1, 0).reshape(S, F * D) for part in (self.totals_FSD, self.counts_FSD)]
        replicates_BD = np.empty((resamples, D))
        for start in range(0, resamples, CHUNK):
            size = min(CHUNK, resamples - start)
            seeds_BS = generator.multinomial(S, np.full(S, 1 / S), size=size).astype(float)
            faults_BF = generator.multinomial(F, np.full(F, 1 / F), size=size) * self.weights_F
            totals, counts = (seeds_BS @ part for part in by_seed)
            means_BFD = pooled(totals, counts, empty=point_FD.ravel()).reshape(size, F, D)
            replicates_BD[start : start + size] = np.einsum("bf,bfd->bd", faults_BF, means_BFD)
            replicates_BD[start : start + size] /= faults_BF.sum(axis=1, keepdims=True)
        return replicates_BD


@dataclass(frozen=True)
class Overall:
    """Share of the possible lead and rank of each detector with their 95 % intervals, (D, 3); best: possibly best."""

    share_D3: np.ndarray
    rank_D3: np.ndarray
    best: list[int]


def overall(shares: Shares, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0) -> Overall:
    """Shares, ranks and the confidence set over faults and seeds.

    Interval ends are percentiles, widened for few faults as ``scores.inference.bca_interval`` is for few seeds. Under
    10 seeds there are ranks and no intervals, and everyone is possibly best. Raises ValueError under ``MIN_FAULTS``
    faults, and where a detector lacks the runs of a fault.
    """
    F, _, D = shares.totals_FSD.shape
    if F < MIN_FAULTS:
        raise ValueError(f"{F} diverging faults: an overall ranking needs at least {MIN_FAULTS}")
    point_D = shares.mean_D()
    if not np.isfinite(point_D).all():
        raise ValueError("some detector has no run of some fault: it cannot be ranked among the others")
    share_D3, rank_D3 = np.full((D, 3), np.nan), np.full((D, 3), np.nan)
    share_D3[:, 0], rank_D3[:, 0] = point_D, ranks(point_D)
    if np.count_nonzero(shares.counts_FSD.any(axis=(0, 2))) < MIN_SEEDS:
        return Overall(share_D3, rank_D3, list(range(D)))
    replicates_BD = shares.replicates_BD(resamples, seed)
    wide = expanded(confidence, F)
    share_D3[:, 1:] = np.quantile(replicates_BD, ((1 - wide) / 2, (1 + wide) / 2), axis=0).T
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    # inverted_cdf returns ranks that were attained, never a value between two
    rank_D3[:, 1:] = np.quantile(ranks(replicates_BD), tails, axis=0, method="inverted_cdf").T
    return Overall(share_D3, rank_D3, possibly_best(point_D, replicates_BD))


def possibly_best(point_D: ArrayLike, replicates_BD: ArrayLike, *, size: float = 0.05) -> list[int]:
    """The columns that are possibly best, larger is better: model confidence set (Hansen, Lunde & Nason 2011), T_max.

    replicates_BD: bootstrap replicates of ``point_D``. While the largest t of "below the mean of those left" is
    larger than chance allows, its column goes, and with it those that equal it in every replicate.
    """
    point_D, replicates_BD = np.asarray(point_D, float), np.asarray(replicates_BD, float)
    left = list(range(len(point_D)))
    while len(left) > 1:
        gap = point_D[left].mean() - point_D[left]
        noise = replicates_BD[:, left].mean(axis=1, keepdims=True) - replicates_BD[:, left] - gap
        error = np.maximum(noise.std(axis=0), 1e-12)  # a gap that no replicate changes is a sure verdict
        worst = int(np.argmax(gap / error))
        if np.mean((noise / error).max(axis=1) >= gap[worst] / error[worst]) >= size:
            break
        out = replicates_BD[:, left[worst]]
        left = [d for d in left if d != left[worst] and not np.array_equal(replicates_BD[:, d], out)]
    return left
