"""river's drift detectors as charts, and their settings in ``conf/rule``, with ranges that river lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from joblib import Parallel, cpu_count, delayed
from pydantic import Field

from foreshock.analysis.detect.charts import Chart
from foreshock.experiments.validation import Node, check_node

RIVER = {"adwin": "ADWIN", "page_hinkley": "PageHinkley", "kswin": "KSWIN"}
"""Names of conf/rule and classes of river.drift."""

MANY_SAMPLES = 50_000
"""From so many samples on, processes pay for KSWIN, which runs a test of SciPy's at every one. The others are cheap."""


class Adwin(Node):
    delta: float = Field(default=0.002, gt=0, lt=1)
    clock: int = Field(default=32, ge=1)
    max_buckets: int = Field(default=5, ge=1)
    min_window_length: int = Field(default=5, ge=1)
    grace_period: int = Field(default=10, ge=1)


class PageHinkley(Node):
    min_instances: int = Field(default=30, ge=1)
    delta: float = Field(default=0.005, ge=0)
    threshold: float = Field(default=50.0, gt=0)
    alpha: float = Field(default=0.9999, gt=0, le=1)
    mode: Literal["up", "down", "both"] = "both"


class KSWIN(Node):
    alpha: float = Field(default=0.005, gt=0, lt=1)
    window_size: int = Field(default=100, ge=2)
    stat_size: int = Field(default=30, ge=1)
    seed: int | None = Field(default=None, ge=0)


SETTINGS: dict[str, type[Node]] = {"adwin": Adwin, "page_hinkley": PageHinkley, "kswin": KSWIN}


def check_river(name: str, parameters: Mapping[str, Any]) -> None:
    """Raises ValueError, in one line that names the key, where a parameter of ``SETTINGS[name]`` is not allowed."""
    check_node(SETTINGS[name], dict(parameters), "rule")


@dataclass(frozen=True)
class RiverDetector(Chart):
    """One of river's drift detectors; the statistic is how many drifts it has reported so far.

    They report a change in either direction, and a threshold of their own decides what a change is; counting makes them
    comparable: an alarm is one drift more than healthy runs have at the false-alarm rate.
    """

    name: str
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            self._new()
        except (TypeError, ValueError) as error:
            raise ValueError(f"rule.{self.name}={dict(self.parameters)} is not allowed: {error}") from None

    def _new(self) -> Any:
        from river import drift  # takes a second to import

        return getattr(drift, RIVER[self.name])(**self.parameters)

    def _of(self, z: np.ndarray) -> np.ndarray:
        series = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
        at_once = min(cpu_count(), len(series)) if self.name == "kswin" and z.size >= MANY_SAMPLES else 1
        counts = Parallel(at_once)(delayed(self._count)(of_run) for of_run in series)
        return np.array(counts, float).reshape(z.shape)

    def _count(self, series: np.ndarray) -> np.ndarray:
        """(T,) -> (T,): how many drifts a new detector has reported by each sample."""
        detector, drifts = self._new(), np.zeros(len(series))
        for i, value in enumerate(series.tolist()):
            detector.update(value)
            drifts[i] = detector.drift_detected
        return np.cumsum(drifts)
