"""The verdict on one run: the class, layer and head of a fault, from how far which conservation laws are broken.

Statistic, of each law's ratio to predicted rounding noise, layer and head: the root mean square over the last
``WINDOW`` readings, so that one lucky reading names nothing and a weak fault adds up. A ``level`` is its logarithm,
counted from 0 at what is usual in healthy runs to 1 at the most that they reach, as ``locate.localise`` sets it: laws
with a short and with a long tail are alike in it. Alarm: a level above the threshold. Verdict, ``WINDOW`` readings
later, when the window has left the healthy past behind:

- the place is where the largest level since the alarm is: its kind of law, layer and head;
- in attention the laws that stand above 1 there are the pattern; one law alone pays for no other's tail. The class is
  the one that needs least change of the pattern, sum of |level - 1| over the laws on the wrong side; any at all
  makes the verdict inexact;
- elsewhere the law itself names class and part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foreshock.analysis.detect.bands import finite_or_inf
from foreshock.analysis.locate.laws import ATTENTION, EITHER, RECOMPUTED
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.law import Law

WINDOW = 10
"""Readings; as long as the past of the self track. A truncated bit raises a ratio by a half or more: 10 show that."""
NO_ALARM = "no alarm"
BROKEN = 1.0
"""A level that no healthy reference run passes."""
FURTHEST = 1e3
"""What stands for a level of minus or plus infinity."""


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
        """(layers, heads): the largest level at positions from first to last; -inf where there is none."""
        chosen = self.level[(self.positions >= first) & (self.positions <= last)]
        return np.where(np.isnan(chosen), -np.inf, chosen).max(axis=0, initial=-np.inf)

    def at(self, position: int) -> np.ndarray:
        """(layers, heads): the last level up to a position; -inf where there is none."""
        chosen = self.level[self.positions <= position][-1:]
        return np.where(np.isnan(chosen), -np.inf, chosen).max(axis=0, initial=-np.inf)


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


def nearest_class(levels: Mapping[str, float]) -> tuple[str, bool]:
    """The class of attention that the levels of its laws are nearest to, and whether the pattern is not just that.

    Laws that are not watched decide nothing. The class of fewer laws wins a tie.
    """
    excess = {law: float(np.clip(level - BROKEN, -FURTHEST, FURTHEST)) for law, level in levels.items()}

    def change(site_class: str) -> float:
        broken, either = ATTENTION[site_class] | RECOMPUTED[site_class], EITHER.get(site_class, frozenset())
        return sum(abs(e) for law, e in excess.items() if (e > 0) != (law in broken) and law not in either)

    best = min(sorted(ATTENTION, key=lambda site_class: len(ATTENTION[site_class])), key=change)
    return best, change(best) > 0


def name_site(signals: Sequence[Levels], threshold: float) -> Verdict:
    """The verdict on one run; without an alarm it names nothing."""
    alarms = []
    for signal in signals:
        above = np.flatnonzero((signal.level > threshold).any(axis=(1, 2)))[:1]
        alarms += [
            (int(signal.positions[i]), int(signal.positions[min(i + WINDOW, len(signal.positions) - 1)])) for i in above
        ]
    if not alarms:
        return Verdict()
    alarm, end = min(alarms)
    peaks = [signal.peak(alarm, end) for signal in signals]
    first, top = max(zip(signals, peaks, strict=True), key=lambda pair: pair[1].max())
    layer, head = (int(i) for i in np.unravel_index(top.argmax(), top.shape))
    broken = {str(signal.law) for signal, peak in zip(signals, peaks, strict=True) if (peak > threshold).any()}
    part: str | None
    site_class, part, inexact = first.law.kind, first.law.part, False
    if first.law.kind == "attention":
        there: dict[str, float] = {}
        for signal in signals:
            if signal.law.kind == "attention":
                there[signal.law.part] = max(there.get(signal.law.part, -np.inf), float(signal.at(end)[layer, head]))
        (site_class, inexact), part = nearest_class(there), None
        broken |= {law for law, level in there.items() if level > BROKEN}
    return Verdict(
        alarm,
        end,
        site_class,
        part,
        layer if "layer" in first.axes else None,
        head if "head" in first.axes else None,
        inexact,
        tuple(sorted(broken)),
    )
