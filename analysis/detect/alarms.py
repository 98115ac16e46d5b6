"""From z-scores to an alarm: the worst layer and head, its chart, and the threshold at a false-alarm rate.

The threshold of a chart is set on healthy runs alone. ``analysis.detect.tracks`` says where the z-scores come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from foreshock.analysis.detect.charts import AlarmRule, Chart, Persistent


def worst(z: np.ndarray) -> np.ndarray:
    """(..., T, layers, heads) -> (..., T): the largest; NaN where every layer and head is missing."""
    largest = np.where(np.isnan(z), -np.inf, z).max(axis=(-2, -1), initial=-np.inf)
    return np.where(np.isneginf(largest), np.nan, largest)


def oriented(z: np.ndarray, bad: str) -> list[np.ndarray]:
    """The worst of (..., T, layers, heads) z-scores, positive is bad: one series (..., T), or two for ``both``."""
    sides = {"up": (z,), "down": (-z,), "both": (z, -z)}[bad]
    if np.isfinite(z).all():
        return [side.max(axis=(-2, -1), initial=-np.inf) for side in sides]
    broken = np.isposinf(z)  # a broken value is bad in every direction
    return [worst(np.where(broken, np.inf, side)) for side in sides]


def fitted(rule: AlarmRule, reference: Sequence[Sequence[np.ndarray]]) -> list[AlarmRule]:
    """The rule for each side of a signal, calibrated on that side of the reference runs (runs of sides of (T,))."""
    return [rule.calibrate(list(side)) for side in zip(*reference, strict=True)]


def chart_statistics(runs: Sequence[Sequence[np.ndarray]], rules: Sequence[AlarmRule]) -> list[np.ndarray]:
    """Of every run the larger of the one-sided charts of its ``oriented`` series, one rule a side: (T,) a run."""
    sides = [_statistics(rule, [run[i] for run in runs]) for i, rule in enumerate(rules)]
    return [np.fmax.reduce(charted) for charted in zip(*sides, strict=True)]


def _statistics(rule: AlarmRule, series: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A rule's statistic of each series: charts take all that lack the same samples, a stranger's rule one by one.

    The stranger's rule gets them in an order that says nothing of whose they are.
    """
    if not isinstance(rule, (Chart, Persistent)):
        order = sorted(range(len(series)), key=lambda i: sha256(series[i].tobytes()).digest())
        charted = {i: rule.statistic(series[i]) for i in order}
        return [charted[i] for i in range(len(series))]
    alike: dict[bytes, list[int]] = {}
    for i, x in enumerate(series):
        alike.setdefault(np.isnan(x).tobytes(), []).append(i)
    statistics: dict[int, np.ndarray] = {}
    for group in alike.values():
        statistics |= zip(group, rule.statistic(np.stack([series[i] for i in group])), strict=True)
    return [statistics[i] for i in range(len(series))]


def conformal_rank(n: int, alpha: float) -> int:
    """ceil((n + 1)(1 - alpha)), the rank of the threshold among n maxima; errors as of ``conformal_threshold``."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1")
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if rank > n:
        needed = math.ceil(1 / alpha - 1 - 1e-9)
        raise ValueError(
            f"{n} calibration runs cannot support alpha={alpha}: the smallest is {1 / (n + 1):.4g}, and {alpha} needs "
            f"{needed} runs"
        )
    return rank


def conformal_threshold(maxima: np.ndarray | Sequence[float], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n healthy runs' largest statistics.

    Split conformal on the path maximum: a healthy run's chance to rise strictly above is at most alpha
    on average, whatever the autocorrelation. At alpha = 1 / (n + 1) it is the largest of all. Raises ValueError
    where n is too small for alpha, naming the smallest alpha that n supports, 1 / (n + 1); also on NaN.
    """
    maxima = np.sort(np.asarray(maxima, float))
    rank = conformal_rank(len(maxima), alpha)
    if np.isnan(maxima).any():
        raise ValueError("a calibration run has no statistic (NaN)")
    return float(maxima[rank - 1])


def anytime_threshold(samples: int, alpha: float) -> float:
    """log(samples / alpha): in so many healthy samples ``ShiryaevRoberts`` passes it with probability <= alpha."""
    if samples < 1 or not 0 < alpha < 1:
        raise ValueError(f"samples={samples}, alpha={alpha}: at least 1 sample and alpha between 0 and 1")
    return math.log(samples / alpha)


def first_alarm(statistic: np.ndarray, positions: np.ndarray, threshold: float) -> int | None:
    """The first position at which the statistic stands strictly above the threshold, or None.

    The cadence of the samples is part of the alarm's time: what happens between two of them shows at the later one.
    """
    above = statistic > threshold
    return int(positions[above.argmax()]) if above.any() else None
