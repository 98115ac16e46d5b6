"""The charts of ``analysis.detect.charts`` one sample after the other, with the same statistic at each."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from foreshock.analysis.detect.calibration import ONLINE_CHARTS
from foreshock.analysis.detect.charts import CUSUM, EWMA, GLR, AlarmRule, Persistent, Shewhart
from foreshock.analysis.detect.rules import make_rule


class OnlineChart(Protocol):
    """``update`` takes a finite z-score, positive is bad, and returns the statistic; a missing one is left out."""

    def update(self, z: float) -> float: ...


class OnlineShewhart:
    def update(self, z: float) -> float:
        return z


class OnlineEWMA:
    def __init__(self, weight: float) -> None:
        self._weight, self._level = weight, 0.0

    def update(self, z: float) -> float:
        self._level = self._weight * z + (1 - self._weight) * self._level
        return self._level


class OnlineCUSUM:
    def __init__(self, drift: float) -> None:
        self._drift, self._sum = drift, 0.0

    def update(self, z: float) -> float:
        self._sum = max(0.0, self._sum + z - self._drift)
        return self._sum


class OnlineGLR:
    def __init__(self, window: int) -> None:
        self._past: deque[float] = deque(maxlen=window)

    def update(self, z: float) -> float:
        self._past.appendleft(z)
        total, largest = 0.0, 0.0
        for n, value in enumerate(self._past, 1):
            total += value
            largest = max(largest, max(total, 0.0) ** 2 / (2 * n))
        return largest


class OnlinePersistent:
    """The smallest of the last ``samples`` statistics, -Inf before there are so many."""

    def __init__(self, chart: OnlineChart, samples: int) -> None:
        self._chart, self._last = chart, deque[float](maxlen=samples)

    def update(self, z: float) -> float:
        self._last.append(self._chart.update(z))
        return min(self._last) if len(self._last) == self._last.maxlen else float("-inf")


def online(rule: AlarmRule) -> OnlineChart:
    """Raises ValueError for a chart that is not of ``ONLINE_CHARTS``."""
    match rule:
        case Shewhart():
            return OnlineShewhart()
        case EWMA():
            return OnlineEWMA(rule.weight)
        case CUSUM():
            return OnlineCUSUM(rule.drift)
        case GLR():
            return OnlineGLR(rule.window)
        case Persistent():
            return OnlinePersistent(online(rule.rule), rule.samples)
    raise ValueError(f"chart={type(rule).__name__} is not allowed for live alarms: one of {', '.join(ONLINE_CHARTS)}")


def chart_of(node: Mapping[str, Any]) -> OnlineChart:
    """The chart that a file of thresholds names, with its parameters."""
    return online(make_rule(**node))
