"""Signals on a common axis, optimizer steps or training tokens, so that runs can be compared sample by sample.

At equal steps a run with a smaller batch has learnt less and looks healthier than it is; at equal tokens
it is judged against what a healthy run looks like after the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from foreshock.experiments.trace import Series
from foreshock.monitors.cadence import Cadence

Axis = Literal["steps", "tokens"]
AXES: tuple[str, ...] = get_args(Axis)


@dataclass(frozen=True)
class Aligned:
    """One signal of one run on a common axis: positions (N,), values and undefined (N, layers, heads)."""

    positions: np.ndarray
    values: np.ndarray
    undefined: np.ndarray


def positions(series: Series, axis: str) -> np.ndarray:
    """Where the samples stand on the axis. Raises ValueError for an axis not in ``AXES``."""
    if axis not in AXES:
        raise ValueError(f"align={axis!r} is not allowed: one of {', '.join(AXES)}")
    return series.steps if axis == "steps" else series.tokens


def broken(series: Series | Aligned) -> np.ndarray:
    """True from the first sample on that is not finite and not missing, per layer and head."""
    lost = ~np.isfinite(series.values) & ~series.undefined
    return np.maximum.accumulate(lost, axis=0) if lost.any() else lost


def thin(series: Series, cadence: Cadence) -> Series:
    """The samples that a cadence has too; one that was skipped over still breaks the signal for good."""
    kept = _due(cadence, int(series.steps.max(initial=0)))[series.steps]
    lost = broken(series)
    if kept.all() and not lost.any():
        return series
    lost = lost[kept]
    values = np.where(lost, np.inf, series.values[kept])
    return Series(series.steps[kept], series.tokens[kept], values, series.undefined[kept] & ~lost)


@lru_cache
def _due(cadence: Cadence, last: int) -> np.ndarray:
    """Whether there is a reading, at each step from 0 to ``last``."""
    return np.array([cadence.is_due(step) for step in range(last + 1)])


def hold(series: Series, axis: str, grid: np.ndarray) -> Aligned:
    """The signal as it was known at each grid position: its latest sample at or before it. Causal.

    Where the samples stand on the grid already, nothing changes. Grid positions before the first sample
    are left out, and so are those after the last but one: a run that ended between two positions shows its last
    sample at the later one. A sample that was skipped over still breaks the signal if it was not finite.
    """
    at = positions(series, axis)
    first, last = (np.searchsorted(grid, at[i], "left") if len(at) else 0 for i in (0, -1))
    grid = grid[first : last + 1] if len(at) else grid[:0]
    lost = broken(series)
    if np.array_equal(grid, at) and not lost.any():
        return Aligned(grid, series.values, series.undefined)
    index = np.searchsorted(at, grid, "right") - 1
    values = np.where(lost, np.inf, series.values)
    return Aligned(grid, values[index], (series.undefined & ~lost)[index])
