"""Rules that need no healthy run. Each judges the present reading as ``analysis.detect`` judges a saved one.

A value that is not finite breaks ``non_finite`` and is a missing sample for the others; offline it breaks every track.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import ndtri, stdtrit

from foreshock.alarms.budget import Budget
from foreshock.alarms.reading import HostReading
from foreshock.analysis.detect.bands import SELF_WINDOW, SelfBand
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import EXACT, LEVEL, RATIO, Signal

THEORY = "random_matrix"
"""The family whose limits are numbers of a theory of noise, which every trained model passes: no rule of a source."""

SIGNS = {"up": (1.0,), "down": (-1.0,), "both": (1.0, -1.0)}
"""By bad direction, what turns a z-score into one that is bad above."""


@dataclass(frozen=True)
class Breach:
    """What a reading broke a rule by; index: of the worst value, flat."""

    index: int
    statistic: float
    threshold: float | None
    side: str


class Rule(Protocol):
    """One way to judge a reading. name: in events; ``judge`` is called once a reading, in the order of steps."""

    name: str

    def applies(self, signal: Signal) -> bool: ...

    def judge(self, reading: HostReading) -> Breach | None: ...

    def per_million_steps(self, step: int) -> float | None:
        """False alarms that healthy training raises, over all signals of the rule; None where nobody knows."""
        ...


class NonFinite:
    """``non_finite``: a NaN or Inf that arose from a nonzero computation, in any signal. Healthy training has none."""

    name = "non_finite"

    def applies(self, signal: Signal) -> bool:
        return True

    def judge(self, reading: HostReading) -> Breach | None:
        lost = reading.lost
        if not lost.any():
            return None
        index = int(lost.argmax())
        return Breach(index, float(reading.value.flat[index]), None, "not finite")

    def per_million_steps(self, step: int) -> float:
        return 0.0


class Exact:
    """``exact``: a nonzero reading of a signal that is 0 in every healthy run.

    A count stays what it is after an event: a reading that equals the one before it is no new breach.
    """

    name = "exact"

    def __init__(self) -> None:
        self._last: dict[str, np.ndarray] = {}

    def applies(self, signal: Signal) -> bool:
        return signal.kind == EXACT

    def judge(self, reading: HostReading) -> Breach | None:
        now = np.nan_to_num(reading.finite)
        before = self._last.get(reading.signal.name, np.zeros_like(now))
        self._last[reading.signal.name] = now
        news = np.where((now != 0) & (now != before), np.abs(now), 0.0)
        index = int(news.argmax())
        return Breach(index, float(now.flat[index]), 0.0, "not 0") if news.flat[index] else None

    def per_million_steps(self, step: int) -> float:
        return 0.0


class Published:
    """``published``: a reading beyond the limit that the signal's own source gives. Nobody knows its false alarms."""

    name = "published"

    def applies(self, signal: Signal) -> bool:
        has_limit = signal.above is not None or signal.below is not None
        return has_limit and signal.kind in (LEVEL, RATIO) and signal.family != THEORY

    def judge(self, reading: HostReading) -> Breach | None:
        x, signal = reading.finite, reading.signal
        if signal.above is not None and (x > signal.above).any():
            index = int(np.nanargmax(x))
            return Breach(index, float(x.flat[index]), signal.above, "above")
        if signal.below is not None and (x < signal.below).any():
            index = int(np.nanargmin(x))
            return Breach(index, float(x.flat[index]), signal.below, "below")
        return None

    def per_million_steps(self, step: int) -> None:
        return None


class Budgeted:
    """What rules with a budget share: the step of each signal's last reading. count: signals that share the budget."""

    def __init__(self, budget: Budget, signals: Sequence[Signal]) -> None:
        self.budget, self._count = budget, max(1, sum(self.applies(signal) for signal in signals))
        self._before: dict[str, int] = {}

    def applies(self, signal: Signal) -> bool:
        raise NotImplementedError

    def _level(self, reading: HostReading, sides: int = 1) -> float:
        signal, step = reading.signal, reading.step
        before = self._before.get(signal.name, 0)
        self._before[signal.name] = step
        return self.budget.a_look(step, before, signal.every_steps, sides * reading.value.size, self._count)


class Universal(Budgeted):
    """``universal``: a ratio to predicted noise above the number that its prediction gives by itself.

    z with 2 (1 - Phi(z)) = the level of a look (``Budget``, ``analysis.detect.tracks.universal_threshold``). The rate
    is at most that of the budget, as far as the prediction is right.
    """

    name = "universal"

    def applies(self, signal: Signal) -> bool:
        return signal.kind == RATIO and signal.universal

    def judge(self, reading: HostReading) -> Breach | None:
        level, x = self._level(reading), reading.finite
        threshold = -float(ndtri(level / 2))
        if not (x > threshold).any():
            return None
        index = int(np.nanargmax(x))
        return Breach(index, float(x.flat[index]), threshold, "above")

    def per_million_steps(self, step: int) -> float:
        return self.budget.per_million_steps(step)


class OwnPast:
    """The z-scores of the self track, (layers, heads), one reading after the other (``SelfBand``)."""

    def __init__(self) -> None:
        self._past: dict[str, deque[np.ndarray]] = {}

    def z(self, reading: HostReading) -> np.ndarray | None:
        """Of this reading; None during the first 2 W."""
        past = self._past.setdefault(reading.signal.name, deque(maxlen=2 * SELF_WINDOW + 1))
        past.append(reading.finite)
        if len(past) <= 2 * SELF_WINDOW:
            return None
        x = np.stack(past)
        scores: np.ndarray = SelfBand().z(Aligned(np.arange(len(x)), x, np.isnan(x)))[-1]
        return scores


class Self(Budgeted):
    """``self``: a reading far from the run's own past, from its 21st reading on; it cannot see what was there before.

    z as of ``SelfBand``, of a reading against 11 others. Were these normal and independent, z sqrt(11 / 12) would be
    Student's t with 10 degrees of freedom, which gives the threshold at the level of a look (``Budget``). Training is
    neither, so the rule has no rate.
    """

    name = "self"

    def __init__(self, budget: Budget, signals: Sequence[Signal], calibrated: Sequence[str] = ()) -> None:
        self.calibrated = frozenset(calibrated)
        super().__init__(budget, signals)
        self._own = OwnPast()

    def applies(self, signal: Signal) -> bool:
        return signal.kind in (LEVEL, RATIO) and signal.name not in self.calibrated

    def judge(self, reading: HostReading) -> Breach | None:
        signs = SIGNS[reading.signal.bad]
        level, z = self._level(reading, len(signs)), self._own.z(reading)
        if z is None:
            return None
        sides = np.stack([sign * z for sign in signs])
        threshold = student_threshold(level)
        if not (sides > threshold).any():
            return None
        side, index = divmod(int(np.nanargmax(sides)), z.size)
        return Breach(index, float(sides.flat[side * z.size + index]), threshold, "above" if signs[side] > 0 else "below")

    def per_million_steps(self, step: int) -> None:
        return None


def student_threshold(level: float) -> float:
    """The z-score of the self track that independent normal readings pass with this probability."""
    others = SELF_WINDOW + 1
    return -float(stdtrit(others - 1, level)) * math.sqrt((others + 1) / others)
