"""A saved run against thresholds that healthy runs have set before, as a live watch would judge it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from foreshock.analysis.detect.alarms import chart_statistics, oriented
from foreshock.analysis.detect.bands import ReferenceBand
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.detect.thresholds import SignalThreshold
from foreshock.analysis.runs.align import Aligned
from foreshock.experiments.trace import Series


def on_band(series: Series, known: SignalThreshold) -> Aligned:
    """The samples at the steps of a threshold's band."""
    kept = np.isin(series.steps, known.positions)
    return Aligned(series.steps[kept], series.values[kept], series.undefined[kept])


def z_scores(series: Aligned, known: SignalThreshold) -> np.ndarray:
    """(T, layers, heads) of a series at the band's steps, against a band of the reference track."""
    return ReferenceBand(np.array(known.positions), np.array(known.centre), np.array(known.scale)).z(series)


def statistic(z: np.ndarray, known: SignalThreshold, chart: Mapping[str, Any]) -> np.ndarray:
    """The charted statistic (T,) of z-scores, which alarms strictly above the threshold's limit."""
    sides = oriented(z, known.bad)
    return chart_statistics([sides], [make_rule(**chart)] * len(sides))[0]
