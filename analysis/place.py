"""The verdict on one run: the class, layer and head of a fault, from how far which conservation laws are broken.

Statistic, of each law's ratio to predicted rounding noise, layer and head: the root mean square over the last
``WINDOW`` readings, so that one lucky reading names nothing and a weak fault adds up. A ``level`` is that in units of
what healthy runs reach, as ``analysis.localise`` sets it. Alarm: a level above the threshold. Verdict, ``WAIT``
readings later, when the window has left the healthy past behind: from the peaks since the alarm,

- the place is where the largest level is: its kind of law, layer and head;
- in attention the laws of that layer above the threshold are the pattern; the class is the one that needs least change
  of it, sum of |ln(level / threshold)| over the laws on the wrong side; any at all makes the verdict inexact;
- elsewhere the law itself names class and part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.align import Aligned
from analysis.laws import ATTENTION, Law
from analysis.tracks import finite_or_inf

WINDOW = 10
"""Readings; as long as the past of the self track. A truncated bit raises a ratio by a half or more: 10 show that."""
WAIT = 10
NO_ALARM = "no alarm"
FURTHEST = 700.0
"""|ln| that stands for a level of 0 or infinity."""


def rolling_rms(series: Aligned, window: int = WINDOW) -> np.ndarray:
    """(T, layers, heads): root mean square of the last ``window`` readings of each layer and head.

    NaN where half of them or more are missing, as at the start; Inf from the first on that is not finite.
    """
    x = finite_or_inf(series)
    padded = np.concatenate((np.full((window - 1, *x.shape[1:]), np.nan), x))
    last = np.lib.stride_tricks.sliding_window_view(padded, window, axis=0) if len(x) else np.empty((*x.shape, 0))
    present = ~np.isnan(last)
    count = present.sum(-1)
    square = np.where(present, last, 0.0) ** 2
    return np.where(count > window // 2, np.sqrt(square.sum(-1) / np.maximum(count, 1)), np.nan)


@dataclass(frozen=True)
class Levels:
    """One signal of one run: positions (T,), level (T, layers, heads), and whether layers and heads have numbers."""

    law: Law
    axes: tuple[str, ...]
    positions: np.ndarray
    level: np.ndarray

    def peak(self, first: int, last: int) -> np.ndarray:
        """(layers, heads): the largest level at positions from first to last; 0 where there is none."""
        chosen = self.level[(self.positions >= first) & (self.positions <= last)]
        return np.where(np.isnan(chosen), 0.0, chosen).max(axis=0, initial=0.0)


@dataclass(frozen=True)
class Verdict:
    """What was named: alarm and verdict on the experiment's axis; the rest None where nothing alarmed."""

    alarm: int | None = None
    verdict: int | None = None
    site_class: str = NO_ALARM
    part: str | None = None
    layer: int | None = None
    head: int | None = None
    inexact: bool = False
    broken: tuple[str, ...] = ()


def nearest_class(levels: Mapping[str, float], threshold: float) -> tuple[str, bool]:
    """The class of attention that the levels of its laws are nearest to, and whether the pattern is not just that.

    A law without a level counts as kept. The class of fewer laws wins a tie.
    """

    def change(laws: frozenset[str]) -> float:
        with np.errstate(divide="ignore"):
            excess = {law: float(np.log(level / threshold)) for law, level in levels.items()}
        wrong = [min(abs(e), FURTHEST) for law, e in excess.items() if (e > 0) != (law in laws)]
        return sum(wrong) + FURTHEST * len(laws - set(levels))

    changes = {
        site_class: change(laws) for site_class, laws in sorted(ATTENTION.items(), key=lambda item: len(item[1]))
    }
    best = min(changes, key=lambda site_class: changes[site_class])
    return best, changes[best] > 0


def name_place(signals: Sequence[Levels], threshold: float) -> Verdict:
    """The verdict on one run; without an alarm it names nothing."""
    alarms = []
    for one in signals:
        above = np.flatnonzero((one.level > threshold).any(axis=(1, 2)))[:1]
        alarms += [(int(one.positions[i]), int(one.positions[min(i + WAIT, len(one.positions) - 1)])) for i in above]
    if not alarms:
        return Verdict()
    alarm, end = min(alarms)
    peaks: dict[tuple[Law, tuple[str, ...]], np.ndarray] = {}
    for one in signals:
        key, peak = (one.law, one.axes), one.peak(alarm, end)
        peaks[key] = np.maximum(peaks[key], peak) if key in peaks else peak
    (law, axes), top = max(peaks.items(), key=lambda item: item[1].max())
    layer, head = (int(i) for i in np.unravel_index(top.argmax(), top.shape))
    site_class, part, inexact = law.kind, law.part, False
    if law.kind == "attention":
        beside = {other.part: float(peak[layer].max()) for (other, _), peak in peaks.items() if other.kind == law.kind}
        (site_class, inexact), part = nearest_class(beside, threshold), None
    return Verdict(
        alarm,
        end,
        site_class,
        part,
        layer if "layer" in axes else None,
        head if "head" in axes else None,
        inexact,
        tuple(sorted({str(one) for (one, _), peak in peaks.items() if (peak > threshold).any()})),
    )
