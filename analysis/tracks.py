"""What a signal is held against, in ways that are never mixed in one table.

``reference``: the per-sample median of healthy reference runs (the paper's own setting, not deployable).
``self``: the run's own lagged window (deployable; it cannot see a fault that is there from step 0).
``floor``: nothing; the signal is already a ratio to what noise alone would give.
``published``: the number that the source of the signal gives (``monitors/catalogue.csv``).
``universal``: the number that a prediction gives by itself: no ratio to predicted noise should ever pass it.
The first three give z-scores, (T samples, layers, heads), which charts and a conformal threshold follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from analysis.align import Aligned, broken
from analysis.rounding import mean_resolution

TRACKS = ("reference", "self", "floor", "published", "universal")
OVER_NOISE = ".over_noise"
"""How the name of a signal ends that is a residual over its predicted rounding noise."""

LAWS_OF_ATTENTION = ("key_shift", "value_shift", "qk_gauge", "vo_gauge")
OF_ATTENTION = (*(f"{law}_residual" for law in LAWS_OF_ATTENTION), "attention_recomputed")
"""Begins the signals whose predicted rounding is a threshold by itself: the kernel's own arithmetic is computed again.
Of other laws it is a scale: it takes tokens as independent, or one library's order of sums as given."""

CATALOGUE = Path(__file__).resolve().parent.parent / "monitors" / "catalogue.csv"
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
    found = np.full(residual.shape[:2], np.nan)
    if last > first:
        windows = np.lib.stride_tricks.sliding_window_view(residual, 2 * POOL_SAMPLES + 1, axis=0)
        found[first:last] = _median(windows.reshape(*windows.shape[:2], -1))
    for t in (*range(min(first, len(residual))), *range(last, len(residual))):
        near = np.moveaxis(residual[max(0, t - POOL_SAMPLES) : t + POOL_SAMPLES + 1], 0, -1)
        found[t] = _median(near.reshape(len(near), -1))
    return found


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
    found = []
    for i, own in enumerate(values):
        centre, scale = _centre_and_scale(np.concatenate(values[:i] + values[i + 1 :], axis=2))
        found.append((own - centre[..., None]) / np.where(scale > 0, scale, np.nan)[..., None])
    return found


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


Band = ReferenceBand | SelfBand | Floor


def _is_over_noise(signal: str) -> bool:
    """Whether a signal is a score against predicted noise."""
    return family(signal) == "random_matrix" or signal.endswith(OVER_NOISE)


def check_has_say(track: str, name: str) -> None:
    """Raise DeclinedSignal where a track has nothing to say of a signal, whatever its values."""
    predicted = {"floor": _is_over_noise(name), "universal": name.endswith(OVER_NOISE)}
    if not predicted.get(track, True):
        raise DeclinedSignal(f"{name}: no ratio to predicted noise, so the {track} track has no say")
    if track == "universal" and not name.startswith(OF_ATTENTION):
        raise DeclinedSignal(f"{name}: its predicted noise is a scale, and gives no threshold by itself")


def fit_band(track: str, name: str, reference: Sequence[Aligned]) -> Band:
    """The band of a signal on a track. Raises DeclinedSignal where the track cannot judge it."""
    if track == "reference":
        return ReferenceBand.fit(name, reference)
    if track == "self":
        return SelfBand()
    if track == "floor":
        check_has_say(track, name)
        return Floor(1.0 if name.endswith(OVER_NOISE) else 0.0)
    raise ValueError(f"track={track!r} gives no z-scores: one of {', '.join(TRACKS[:3])}")


@lru_cache(maxsize=1)
def catalogue() -> pd.DataFrame:
    """Every monitor's definition, family and published rule, by id."""
    return pd.read_csv(CATALOGUE).set_index("id")


def family(signal: str) -> str:
    """The family of a signal, whose name begins with its catalogue id; ``unknown`` for a monitor not in there."""
    known, name = catalogue(), signal.split(".")[0]
    return str(known.loc[name, "family"]) if name in known.index else "unknown"


@dataclass(frozen=True)
class PublishedRule:
    """An alarm where a raw reading stands strictly above ``above`` or below ``below``, as its source says."""

    above: float
    below: float

    def broken_at(self, series: Aligned) -> np.ndarray:
        """(T,): whether any layer or head breaks the rule; a non-finite value does, a missing one does not."""
        x = finite_or_inf(series)
        return ((x > self.above) | (x < self.below)).any(axis=(1, 2))


def published_rule(signal: str) -> PublishedRule:
    """The numeric rule of a signal's source. Raises DeclinedSignal where the source gives no number."""
    known: Mapping = catalogue()
    name = signal.split(".")[0]
    limits = known.loc[name, ["alarm_above", "alarm_below"]].astype(float) if name in known.index else None
    if limits is None or limits.isna().all():
        raise DeclinedSignal(f"{signal}: no published threshold")
    above, below = limits
    return PublishedRule(np.inf if np.isnan(above) else above, -np.inf if np.isnan(below) else below)


def universal_threshold(looks: int, alpha: float) -> float:
    """The ratio to predicted noise that rounding alone passes in some of so many looks with probability <= alpha.

    z with looks x 2 (1 - Phi(z)) = alpha (Bonferroni, so looks may depend on each other). Where tokens differ, a
    residual is a sum of many rounding errors, hence Gaussian, and a ratio the root mean square of at least one of them
    over what is predicted. One alone, |N(0, 1)|, has the heaviest tail from z = 1.5 on, so z holds for any number of
    rows. Where tokens are alike, a healthy ratio lies between 0 and 2 (``monitors.rounding``), below any z here. No
    healthy run is asked: it promises as much as the prediction is right. Raises ValueError for looks < 1 or alpha
    outside (0, 1), and for an alpha / looks above 0.13, whose z is below 1.5.
    """
    if looks < 1:
        raise ValueError(f"looks={looks} is not allowed: at least 1")
    if not 0 < alpha < 1 or alpha / looks > 0.13:
        raise ValueError(f"alpha={alpha} is not allowed for {looks} looks: above 0, below 1 and 0.13 a look at most")
    return float(norm.isf(alpha / (2 * looks)))
