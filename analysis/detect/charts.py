"""Charts: each turns one causal series of z-scores into a statistic, larger is worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from scipy.signal import lfilter

from foreshock.analysis.detect.rounding import mean_resolution


@runtime_checkable
class AlarmRule(Protocol):
    """A chart: turns a series of z-scores into a statistic. Causal: statistic(x[:t]) == statistic(x)[:t].

    x: (T,), positive is bad; NaN is a missing sample, which leaves the statistic as it was; +inf stays.
    ``calibrate`` returns the chart fitted to series of healthy reference runs; most charts need none.
    """

    def calibrate(self, healthy: Sequence[np.ndarray]) -> AlarmRule: ...

    def statistic(self, x: np.ndarray) -> np.ndarray: ...


class Chart:
    """What the charts share: missing samples are skipped, a +inf is an alarm for good, nothing is fitted.

    A chart gives ``_of``, its statistic of finite series without gaps along their last axis, (..., T) -> (..., T): the
    runs of an experiment are charted together.
    """

    def calibrate(self, healthy: Sequence[np.ndarray]) -> AlarmRule:
        return self

    def _of(self, z: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def statistic(self, x: np.ndarray) -> np.ndarray:
        """(..., T) -> (..., T): one series, or several that lack the same samples. Raises ValueError on others."""
        x = np.asarray(x, float)
        if np.isfinite(x).all():
            return self._of(x)  # nothing missing, nothing broken: most series
        missing = np.isnan(x).reshape(-1, x.shape[-1])
        if (missing != missing[0]).any():
            raise ValueError("series that are charted together lack different samples")
        present = np.flatnonzero(~missing[0])
        z = x[..., present]
        infinite = np.logical_or.accumulate(np.isposinf(z), axis=-1)
        with np.errstate(over="ignore"):
            charted = np.where(infinite, np.inf, self._of(np.where(infinite, 0.0, z)))
        out = np.full(x.shape, np.nan)
        latest = np.searchsorted(present, np.arange(x.shape[-1]), side="right") - 1
        out[..., latest >= 0] = charted[..., latest[latest >= 0]]
        return out


@dataclass(frozen=True)
class Shewhart(Chart):
    """Each z-score by itself (Shewhart 1931)."""

    def _of(self, z: np.ndarray) -> np.ndarray:
        return z


@dataclass(frozen=True)
class EWMA(Chart):
    """E_t = (1 - weight) E_(t-1) + weight z_t from E = 0 (Roberts 1959). The primary chart, weight 0.2."""

    weight: float

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"rule.weight={self.weight} is not allowed: above 0, at most 1")

    def _of(self, z: np.ndarray) -> np.ndarray:
        return lfilter([self.weight], [1.0, self.weight - 1.0], z)


@dataclass(frozen=True)
class CUSUM(Chart):
    """C_t = max(0, C_(t-1) + z_t - drift) from C = 0 (Page 1954)."""

    drift: float

    def __post_init__(self) -> None:
        if not 0 <= self.drift < math.inf:
            raise ValueError(f"rule.drift={self.drift} is not allowed: 0 or more")

    def _of(self, z: np.ndarray) -> np.ndarray:
        # The reflected walk is the walk minus its running minimum (and 0).
        walk = np.cumsum(z - self.drift, axis=-1)
        return walk - np.minimum(0.0, np.minimum.accumulate(walk, axis=-1))


@dataclass(frozen=True)
class GLR(Chart):
    """Windowed generalised likelihood ratio of an upward shift of unknown size and onset (Lai 1995).

    G_t = max over 1 <= n <= window of (z_(t-n+1) + ... + z_t)_+^2 / (2 n), for unit-variance Gaussian samples.
    """

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"rule.window={self.window} is not allowed: at least 1 sample")

    def _of(self, z: np.ndarray) -> np.ndarray:
        sums = np.concatenate((np.zeros((*z.shape[:-1], 1)), np.cumsum(z, axis=-1)), axis=-1)
        largest = np.zeros(z.shape)
        for n in range(1, min(self.window, z.shape[-1]) + 1):
            rise = np.fmax(sums[..., n:] - sums[..., :-n], 0.0)  # fmax: between infinite sums there is none
            np.maximum(largest[..., n - 1 :], rise**2 / (2 * n), out=largest[..., n - 1 :])
        return largest


@dataclass(frozen=True)
class ShiryaevRoberts(Chart):
    """log of the Shiryaev-Roberts e-detector, averaged over ``shifts``, on series whitened as AR(1).

    w_t = (z_t - mean - phi (z_(t-1) - mean)) / sigma; R_t = (1 + R_(t-1)) exp(d w_t - d^2 / 2) for each shift d of
    the whitened mean. Under independent standard normal w the average of R_t - t is a martingale, so that within N
    samples R rises above N / alpha with probability at most alpha (Shin, Ramdas & Rinaldo, arXiv:2203.03532):
    ``anytime_threshold``, without healthy runs beyond those that fitted the whitening. It is as good as that model: the
    worst of many layers and heads is neither Gaussian nor AR(1), and there the promise can fail.
    ``calibrate`` fits mean, phi and sigma. Raises ValueError without a shift above 0.
    """

    shifts: tuple[float, ...]
    mean: float = 0.0
    phi: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.shifts or min(self.shifts) <= 0:
            raise ValueError(f"rule.shifts={list(self.shifts)} is not allowed: at least one, each above 0")

    def calibrate(self, healthy: Sequence[np.ndarray]) -> ShiryaevRoberts:
        """The chart whitened by healthy series, pooled. Raises ValueError where they do not vary."""
        series = [x[np.isfinite(x)] for x in healthy]
        if not any(len(x) > 2 for x in series):
            raise ValueError("whitening needs a healthy series of at least 3 finite samples")
        mean = float(np.concatenate(series).mean())
        before = np.concatenate([x[:-1] - mean for x in series])
        after = np.concatenate([x[1:] - mean for x in series])
        spread, resolution = float(before @ before), float(mean_resolution(np.concatenate(series)))
        if spread <= len(before) * resolution**2:
            raise ValueError("whitening needs healthy series that vary")
        phi = float(np.clip(before @ after / spread, -0.99, 0.99))
        return replace(self, mean=mean, phi=phi, sigma=float(np.std(after - phi * before)) or 1.0)

    def _of(self, z: np.ndarray) -> np.ndarray:
        centred = z - self.mean
        whitened = centred.copy()
        whitened[..., 1:] -= self.phi * centred[..., :-1]
        whitened[..., :1] *= math.sqrt(1 - self.phi**2)  # the first sample has the stationary variance
        logs = []
        for shift in self.shifts:
            # R_t = sum over onsets k of the likelihood ratio of samples k..t, all in logarithms.
            ratio = np.cumsum(shift * whitened / self.sigma - shift**2 / 2, axis=-1)
            onsets = np.concatenate((np.zeros_like(ratio[..., :1]), -ratio[..., :-1]), axis=-1)
            logs.append(ratio + np.logaddexp.accumulate(onsets, axis=-1))
        return np.logaddexp.reduce(logs, axis=0) - math.log(len(self.shifts))


@dataclass(frozen=True)
class Persistent:
    """Another rule that must stay high: the smallest of its last ``samples`` statistics.

    It passes a threshold at the ``samples``-th sample in a row above it, so that the wait is part of the alarm's
    time, on healthy calibration runs as well; NaN before there are so many.
    """

    rule: AlarmRule
    samples: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"rule.persistence={self.samples} is not allowed: at least 1 sample")

    def calibrate(self, healthy: Sequence[np.ndarray]) -> Persistent:
        return replace(self, rule=self.rule.calibrate(healthy))

    def statistic(self, x: np.ndarray) -> np.ndarray:
        """(..., T) -> (..., T), as the rule takes it."""
        statistic = np.asarray(self.rule.statistic(x), float)
        lowest = statistic.copy()
        for back in range(1, self.samples):
            lowest[..., back:] = np.minimum(lowest[..., back:], statistic[..., :-back])
        lowest[..., : self.samples - 1] = np.nan
        return np.where(np.isposinf(statistic), np.inf, lowest)  # what is broken need not prove that it stays so


def _shiryaev_roberts(shifts: tuple[float, ...]) -> AlarmRule:
    """Without what ``calibrate`` fits."""
    return ShiryaevRoberts(shifts)


CHARTS: dict[str, Callable[..., AlarmRule]] = {
    "shewhart": Shewhart,
    "ewma": EWMA,
    "cusum": CUSUM,
    "glr": GLR,
    "shiryaev_roberts": _shiryaev_roberts,
}
