"""From a signal to an alarm: band, z-score, worst head, chart, conformal threshold.

Order matters: every layer and head is z-scored first, then the worst of them is taken, because layers
differ in level and a mean or a raw minimum hides the one that collapses. Arrays are (T samples, layers,
heads); an absent axis has length 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from scipy.signal import lfilter

from analysis.align import Aligned, broken

MAD_TO_SIGMA = 1.4826
MIN_REFERENCE_RUNS = 4
POOL_SAMPLES = 10


class DeclinedSignal(ValueError):
    """A signal that this track cannot judge, with the reason."""


@runtime_checkable
class AlarmRule(Protocol):
    """A chart: turns a series of z-scores into a statistic. Causal: statistic(x[:t]) == statistic(x)[:t].

    x: (T,), positive is bad; NaN is a missing sample, which leaves the statistic as it was; +inf stays.
    """

    def statistic(self, x: np.ndarray) -> np.ndarray: ...


def _skipping_missing(x: np.ndarray, chart) -> np.ndarray:
    """Run a chart over the samples that exist and hold its value over those that do not; NaN before the first."""
    x = np.asarray(x, float)
    present = ~np.isnan(x)
    out = np.full(x.shape, np.nan)
    out[present] = chart(x[present])
    last = np.maximum.accumulate(np.where(present, np.arange(len(x)), -1))
    return np.where(last >= 0, out[last], np.nan)


@dataclass(frozen=True)
class Shewhart:
    """Each z-score by itself."""

    def statistic(self, x: np.ndarray) -> np.ndarray:
        return _skipping_missing(x, lambda z: z)


@dataclass(frozen=True)
class EWMA:
    """E_t = (1 - weight) E_(t-1) + weight z_t from E = 0 (Roberts 1959). The primary chart, weight 0.2."""

    weight: float

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"rule.weight={self.weight} is not allowed: above 0, at most 1")

    def statistic(self, x: np.ndarray) -> np.ndarray:
        def chart(z: np.ndarray) -> np.ndarray:
            # An infinite sample stays an alarm for good; 0 x inf inside the filter would make it NaN.
            infinite = np.maximum.accumulate(np.isposinf(z))
            filtered = lfilter([self.weight], [1.0, self.weight - 1.0], np.where(infinite, 0.0, z))
            return np.where(infinite, np.inf, filtered)

        return _skipping_missing(x, chart)


@dataclass(frozen=True)
class CUSUM:
    """C_t = max(0, C_(t-1) + z_t - drift) from C = 0 (Page 1954)."""

    drift: float

    def statistic(self, x: np.ndarray) -> np.ndarray:
        def chart(z: np.ndarray) -> np.ndarray:
            # The reflected walk is the walk minus its running minimum (and 0).
            infinite = np.maximum.accumulate(np.isposinf(z))
            walk = np.cumsum(np.where(infinite, 0.0, z - self.drift))
            return np.where(infinite, np.inf, walk - np.minimum(0.0, np.minimum.accumulate(walk)))

        return _skipping_missing(x, chart)


CHARTS: dict[str, type] = {"shewhart": Shewhart, "ewma": EWMA, "cusum": CUSUM}


def make_rule(chart: str, **parameters: float) -> AlarmRule:
    """The chart of a ``conf/rule`` file. Raises ValueError on an unknown one."""
    if chart not in CHARTS:
        raise ValueError(f"rule.chart={chart!r} is not allowed: one of {', '.join(CHARTS)}")
    return CHARTS[chart](**parameters)


def _finite_or_inf(series: Aligned) -> np.ndarray:
    """Values with missing samples as NaN, and everything that is not finite from then on as Inf, per layer and head."""
    return np.where(broken(series), np.inf, np.where(series.undefined, np.nan, series.values))


@dataclass(frozen=True)
class Band:
    """What a signal does in healthy runs: per sample and layer, the heads of a layer sharing one band.

    centre: (T, layers) median over reference runs and heads; scale: (T, layers) 1.4826 x the median
    absolute residual pooled over runs, heads and +-10 samples (the reference track of the protocol).
    """

    positions: np.ndarray
    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, name: str, reference: Sequence[Aligned]) -> Band:
        """Raises DeclinedSignal for fewer than 4 runs, differing positions, missing or constant values."""
        if len(reference) < MIN_REFERENCE_RUNS:
            raise DeclinedSignal(f"{name}: {len(reference)} reference runs, at least {MIN_REFERENCE_RUNS} needed")
        positions = reference[0].positions
        if any(not np.array_equal(series.positions, positions) for series in reference):
            raise DeclinedSignal(f"{name}: reference runs were sampled at different positions")
        values = np.concatenate([_finite_or_inf(series) for series in reference], axis=2)
        if np.isinf(values).any():
            raise DeclinedSignal(f"{name}: a reference run is not finite")
        if np.isnan(values).all(axis=2).any():
            raise DeclinedSignal(f"{name}: some sample is defined in no reference run")
        with np.errstate(all="ignore"):
            centre = np.nanmedian(values, axis=2)
            residual = np.abs(values - centre[..., None])
            edge = np.full((POOL_SAMPLES, *residual.shape[1:]), np.nan)
            windows = np.lib.stride_tricks.sliding_window_view(
                np.concatenate((edge, residual, edge)), 2 * POOL_SAMPLES + 1, axis=0
            )
            scale = MAD_TO_SIGMA * np.nanmedian(windows.reshape(*windows.shape[:2], -1), axis=2)
        if np.any(scale == 0):
            raise DeclinedSignal(f"{name}: zero spread in the reference runs")
        return cls(positions, centre, scale)

    def z(self, series: Aligned) -> np.ndarray:
        """(T, layers, heads) z-scores; NaN where a sample is missing, Inf kept.

        Raises ValueError on positions that the reference runs do not have.
        """
        index = np.searchsorted(self.positions, series.positions)
        if np.any(index >= len(self.positions)) or np.any(self.positions[index] != series.positions):
            raise ValueError("a run has samples at positions that the reference runs do not have")
        return (_finite_or_inf(series) - self.centre[index][..., None]) / self.scale[index][..., None]


def _worst(z: np.ndarray) -> np.ndarray:
    """(T, layers, heads) -> (T,): the largest; NaN where every layer and head is missing."""
    worst = np.where(np.isnan(z), -np.inf, z).max(axis=(1, 2), initial=-np.inf)
    return np.where(np.isneginf(worst), np.nan, worst)


def chart_statistic(z: np.ndarray, bad: str, rule: AlarmRule) -> np.ndarray:
    """The chart over the worst layer and head; ``both`` is the larger of two one-sided charts. (T, L, H) -> (T,)."""
    non_finite = np.isposinf(z)  # a broken value is bad in every direction
    sides = {"up": (z,), "down": (-z,), "both": (z, -z)}[bad]
    statistics = [rule.statistic(_worst(np.where(non_finite, np.inf, side))) for side in sides]
    return np.fmax.reduce(statistics)


def conformal_threshold(maxima: Sequence[float], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n healthy runs' largest statistics.

    Split conformal on the path maximum: a healthy run's chance to rise strictly above is at most alpha
    on average, whatever the autocorrelation. Raises ValueError where n is too small for alpha, naming
    the smallest alpha that n supports, 1 / (n + 1); also on NaN.
    """
    maxima = np.sort(np.asarray(maxima, float))
    n = len(maxima)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1")
    if np.isnan(maxima).any():
        raise ValueError("a calibration run has no statistic (NaN)")
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if rank > n:
        raise ValueError(f"{n} calibration runs cannot support alpha={alpha}: the smallest is {1 / (n + 1):.4g}")
    return float(maxima[rank - 1])


def first_alarm(statistic: np.ndarray, positions: np.ndarray, threshold: float) -> int | None:
    """The first position at which the statistic stands strictly above the threshold, or None."""
    above = np.flatnonzero(statistic > threshold)
    return int(positions[above[0]]) if len(above) else None
