"""Yardsticks: what a signal does in health, and how far a series stands from it, as (T, layers, heads) z-scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from foreshock.analysis.detect.rounding import mean_resolution
from foreshock.analysis.runs.align import Aligned, broken

MAD_TO_SIGMA = 1.4826
MIN_REFERENCE_RUNS = 4
POOL_SAMPLES = 10
SELF_WINDOW = 10
"""W of the self track, in samples."""
UNHEARD_OF = 1e9
"""The z-score of a change after a window that did not vary at all: large, and finite, as nothing is broken."""


class DeclinedSignal(ValueError):
    """A signal that a track cannot judge, with the reason."""


def finite_or_inf(series: Aligned) -> np.ndarray:
    """Values with missing samples as NaN, and everything that is not finite from then on as Inf, per layer and head."""
    return np.where(broken(series), np.inf, np.where(series.undefined, np.nan, series.values))


@dataclass(frozen=True)
class ReferenceBand:
    """What a signal does in healthy runs: per sample and layer, the heads of a layer sharing one band.

    centre: (T, layers) median over reference runs and heads; scale: (T, layers) 1.4826 x the median
    absolute residual pooled over runs, heads and +-10 samples (the reference track of the protocol).
    """

    positions: np.ndarray
    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, name: str, reference: Sequence[Aligned]) -> ReferenceBand:
        """Raises DeclinedSignal for fewer than 4 runs, differing positions, missing or constant values."""
        if len(reference) < MIN_REFERENCE_RUNS:
            raise DeclinedSignal(f"{name}: {len(reference)} reference runs, at least {MIN_REFERENCE_RUNS} needed")
        positions = reference[0].positions
        if any(not np.array_equal(series.positions, positions) for series in reference):
            raise DeclinedSignal(f"{name}: reference runs were sampled at different positions")
        if not len(positions):
            raise DeclinedSignal(f"{name}: no sample in the reference runs")
        values = np.concatenate([finite_or_inf(series) for series in reference], axis=2)
        if np.isinf(values).any():
            raise DeclinedSignal(f"{name}: a reference run is not finite")
        if np.isnan(values).all(axis=2).any():
            raise DeclinedSignal(f"{name}: some sample is defined in no reference run")
        centre, scale = _centre_and_scale(values)
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
        return (finite_or_inf(series) - self.centre[index][..., None]) / self.scale[index][..., None]


def _median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis, NaN left out; NaN where all are."""
    return np.nanmedian(values, axis=-1) if np.isnan(values).any() else np.median(values, axis=-1)


def _pooled_median(residual: np.ndarray) -> np.ndarray:
    """(T, layers): median of (T, layers, n) over n and the +-10 samples that there are, NaN left out."""
    first, last = POOL_SAMPLES, max(POOL_SAMPLES, len(residual) - POOL_SAMPLES)
    spread = np.full(residual.shape[:2], np.nan)
    if last > first:
        windows = np.lib.stride_tricks.sliding_window_view(residual, 2 * POOL_SAMPLES + 1, axis=0)
        spread[first:last] = _median(windows.reshape(*windows.shape[:2], -1))
    for t in (*range(min(first, len(residual))), *range(last, len(residual))):
        near = np.moveaxis(residual[max(0, t - POOL_SAMPLES) : t + POOL_SAMPLES + 1], 0, -1)
        spread[t] = _median(near.reshape(len(near), -1))
    return spread


def _centre_and_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median, and 1.4826 MAD pooled over +-10 samples, (T, layers), of (T, layers, runs and heads); NaN is missing."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a sample that no run has is NaN
        centre = _median(values)
        residual = np.abs(values - centre[..., None])
        scale = MAD_TO_SIGMA * _pooled_median(residual)
    return centre, scale


def left_out_z(reference: Sequence[Aligned]) -> list[np.ndarray]:
    """Of each reference run its (T, layers, heads) z-scores against the band of the others: what a new run would have.

    NaN where a sample is missing, or where the others have none or no spread; Inf kept.
    """
    values = [finite_or_inf(series) for series in reference]
    scores = []
    for i, own in enumerate(values):
        centre, scale = _centre_and_scale(np.concatenate(values[:i] + values[i + 1 :], axis=2))
        scores.append((own - centre[..., None]) / np.where(scale > 0, scale, np.nan)[..., None])
    return scores


def student_threshold(level: float) -> float:
    """The z-score of the self track that independent normal readings pass with this probability, by Student's t.

    z divides by the spread of the W + 1 readings of the window, and its mean is theirs: t with W degrees of freedom,
    widened by sqrt(1 + 1/(W + 1)).
    """
    others = SELF_WINDOW + 1
    return float(student.isf(level, others - 1)) * math.sqrt((others + 1) / others)


@dataclass(frozen=True)
class SelfBand:
    """A signal against the run's own past: z_t = (x_t - mean) / standard deviation of x_(t-2W) ... x_(t-W).

    The lag of W samples keeps a slow change out of its own yardstick; the first 2W samples have no z-score. Each layer
    and head by itself. A window without spread gives 0 where x_t equals it and +-``UNHEARD_OF`` where it does not; what
    rounding alone does to equal numbers (``mean_resolution``) is no spread, and no difference.
    """

    window: int = SELF_WINDOW

    def z(self, series: Aligned) -> np.ndarray:
        """(T, layers, heads) z-scores; NaN where x_t or more than half of its window is missing, Inf kept."""
        x = finite_or_inf(series)
        z = np.full(x.shape, np.nan)
        if len(x) > 2 * self.window:
            past = np.lib.stride_tricks.sliding_window_view(x, self.window + 1, axis=0)[: len(x) - 2 * self.window]
            now = x[2 * self.window :]
            finite = np.isfinite(past)
            count = finite.sum(-1)
            with np.errstate(all="ignore"):
                mean = np.where(finite, past, 0.0).sum(-1) / count
                residual = np.where(finite, past - mean[..., None], 0.0)
                spread = np.sqrt((residual**2).sum(-1) / (count - 1))
                change = np.sign(now - mean) * UNHEARD_OF
                resolution = mean_resolution(past)
                constant = (np.abs(residual) <= resolution[..., None]).all(-1)
                same = np.abs(now - mean) <= resolution
                ratio = np.where(constant, np.where(same, 0.0, change), (now - mean) / spread)
            known = count > self.window // 2
            z[2 * self.window :] = np.where(known & np.isfinite(now), ratio, np.nan)
        return np.where(np.isposinf(x), np.inf, z)


@dataclass(frozen=True)
class Floor:
    """A signal that is its own z-score: a ratio to what noise alone would give, at any step of any run.

    expected: what it is where there is nothing but noise, so that a chart starts from rest: 1 for a root mean square
    over its prediction, 0 for a score of random-matrix theory.
    """

    expected: float = 0.0

    def z(self, series: Aligned) -> np.ndarray:
        """The values less what is expected, (T, layers, heads); NaN where a sample is missing, Inf kept."""
        return finite_or_inf(series) - self.expected


@dataclass(frozen=True)
class Exact:
    """A signal that is 0 in every healthy run: any other reading is as bad as can be, on either side."""

    def z(self, series: Aligned) -> np.ndarray:
        """0 or ``UNHEARD_OF``, (T, layers, heads); NaN where a sample is missing, Inf kept."""
        x = finite_or_inf(series)
        return np.where(np.isfinite(x) & (x != 0), UNHEARD_OF, x)
