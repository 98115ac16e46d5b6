"""Rules that need no healthy run. Each judges the present reading as ``analysis.detect`` judges a saved one.

A value that is not finite breaks ``non_finite`` and is a missing sample for the others; offline it breaks every track.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import ndtri

from foreshock.alarms.budget import Budget
from foreshock.alarms.reading import HostReading
from foreshock.analysis.detect.bands import SELF_WINDOW, SelfBand, student_threshold
from foreshock.analysis.runs.align import Aligned
from foreshock.monitors.signal import EXACT, LEVEL, RATIO, Signal

THEORY = "random_matrix"
"""The family whose limits are numbers of a theory of noise, which every trained model passes: no rule of a source."""

OF_THE_SCALER = ("loss_scale", "overflow_rate", "skipped_updates")
"""What a GradScaler does: it steps in health too, by looking for the largest scale, and a storm has a rule of its own
(``alarms.overflow``)."""

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
    """One way to judge readings. name: in events."""

    name: str

    def applies(self, signal: Signal) -> bool: ...

    def judge(self, readings: Sequence[HostReading]) -> dict[str, Breach]:
        """By signal, what breaks the rule, of the readings of one step that it applies to; called in order of steps."""
        ...

    def per_million_steps(self, step: int) -> float | None:
        """False alarms that healthy training raises, over all signals of the rule; None where nobody knows."""
        ...


class OneByOne:
    """A rule that judges each reading by itself."""

    def breach(self, reading: HostReading) -> Breach | None:
        raise NotImplementedError

    def judge(self, readings: Sequence[HostReading]) -> dict[str, Breach]:
        judged = ((reading.signal.name, self.breach(reading)) for reading in readings)
        return {name: breach for name, breach in judged if breach is not None}


class NonFinite(OneByOne):
    """``non_finite``: a NaN or Inf that arose from a nonzero computation, in any signal. Healthy training has none."""

    name = "non_finite"

    def applies(self, signal: Signal) -> bool:
        return True

    def breach(self, reading: HostReading) -> Breach | None:
        if not reading.lost.any():
            return None
        index = int(reading.lost.argmax())
        return Breach(index, float(reading.value.flat[index]), None, "not finite")

    def per_million_steps(self, step: int) -> float:
        return 0.0


class Exact(OneByOne):
    """``exact``: a nonzero reading of a signal that is 0 in every healthy run.

    A count stays what it is after an event: a reading that equals the one before it is no new breach.
    """

    name = "exact"

    def __init__(self) -> None:
        self._last: dict[str, np.ndarray] = {}

    def applies(self, signal: Signal) -> bool:
        return signal.kind == EXACT

    def breach(self, reading: HostReading) -> Breach | None:
        now = np.nan_to_num(reading.finite)
        before = self._last.get(reading.signal.name, np.zeros_like(now))
        self._last[reading.signal.name] = now
        news = np.where((now != 0) & (now != before), np.abs(now), 0.0)
        index = int(news.argmax())
        return Breach(index, float(now.flat[index]), 0.0, "not 0") if news.flat[index] else None

    def per_million_steps(self, step: int) -> float:
        return 0.0


class Published(OneByOne):
    """``published``: a reading beyond the limit that the signal's own source gives. Nobody knows its false alarms."""

    name = "published"

    def applies(self, signal: Signal) -> bool:
        has_limit = signal.above is not None or signal.below is not None
        return has_limit and signal.kind in (LEVEL, RATIO) and signal.family != THEORY

    def breach(self, reading: HostReading) -> Breach | None:
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


class Levels:
    """The level of each look of a rule that spends a budget on the signals that it ``applies`` to, alike on each."""

    def __init__(self, budget: Budget, signals: int) -> None:
        self.budget, self.signals = budget, signals
        self._before: dict[str, int] = {}

    def of(self, reading: HostReading, sides: int = 1) -> float:
        """Of each value of a reading, on each side; called once a reading."""
        signal, step = reading.signal, reading.step
        before = self._before.get(signal.name, 0)
        self._before[signal.name] = step
        return self.budget.a_look(step, before, signal.every_steps, sides * reading.value.size, max(1, self.signals))


class Universal(OneByOne):
    """``universal``: a ratio to predicted noise above the number that its prediction gives by itself.

    z with 2 (1 - Phi(z)) = the level of a look (``Budget``, ``analysis.detect.tracks.universal_threshold``). The rate
    is at most that of the budget where the prediction is right (``proven``, of the present readings), else unknown.
    """

    name = "universal"

    def __init__(self, budget: Budget, signals: Sequence[Signal]) -> None:
        self.proven = True
        self._levels = Levels(budget, sum(self.applies(signal) for signal in signals))

    def applies(self, signal: Signal) -> bool:
        return signal.kind == RATIO and signal.universal

    def breach(self, reading: HostReading) -> Breach | None:
        x = reading.finite
        threshold = -float(ndtri(self._levels.of(reading) / 2))
        if not (x > threshold).any():
            return None
        index = int(np.nanargmax(x))
        return Breach(index, float(x.flat[index]), threshold, "above")

    def per_million_steps(self, step: int) -> float | None:
        return self._levels.budget.per_million_steps(step) if self.proven else None


class OwnPast:
    """The z-scores of the self track (``SelfBand``), one step after the other, of all signals at once."""

    def __init__(self) -> None:
        self._past: dict[str, np.ndarray] = {}
        self._readings: dict[str, int] = {}

    def z(self, readings: Sequence[HostReading]) -> dict[str, np.ndarray]:
        """By signal, (layers, heads), of the readings of a step; none of a signal's first 2 W."""
        known = [reading for reading in readings if self._add(reading)]
        if not known:
            return {}
        x = np.concatenate([self._past[reading.signal.name] for reading in known], axis=1)[:, None]
        scores = SelfBand().z(Aligned(np.arange(len(x)), x, np.isnan(x)))[-1, 0]
        ends = np.cumsum([reading.value.size for reading in known])
        parts = np.split(scores, ends[:-1])
        return {r.signal.name: part.reshape(r.value.shape) for r, part in zip(known, parts, strict=True)}

    def _add(self, reading: HostReading) -> bool:
        """Whether the signal has a past by now: (2 W + 1, values), the present reading the last."""
        name, now = reading.signal.name, reading.finite.ravel()
        past = self._past.get(name)
        if past is None:
            past = self._past[name] = np.full((2 * SELF_WINDOW + 1, len(now)), np.nan)
        past[:-1] = past[1:]
        past[-1] = now
        self._readings[name] = self._readings.get(name, 0) + 1
        return self._readings[name] > 2 * SELF_WINDOW


class Self:
    """``self``: a reading far from the run's own past, from its 21st reading on; it cannot see what was there before.

    z as of ``SelfBand``, of a reading against 11 others. Were these normal and independent, z sqrt(11 / 12) would be
    Student's t with 10 degrees of freedom, which gives the threshold at the level of a look (``Budget``). Training is
    neither, so the rule has no rate. What a GradScaler does (``OF_THE_SCALER``) is left out. calibrated: signals that
    have a threshold of their own; warmup_steps: readings up
    to there are left out, since a learning rate that rises changes everything.
    """

    name = "self"

    def __init__(
        self, budget: Budget, signals: Sequence[Signal], calibrated: Collection[str] = (), warmup_steps: int = 0
    ) -> None:
        self._warmup_steps, self._signals = warmup_steps, tuple(signals)
        self._levels, self._own = Levels(budget, 0), OwnPast()
        self.leave_to(calibrated)

    def leave_to(self, calibrated: Collection[str]) -> None:
        """Judge all signals but those that have a threshold of their own from now on."""
        self._calibrated = frozenset(calibrated)
        self._levels.signals = sum(self.applies(signal) for signal in self._signals)

    def applies(self, signal: Signal) -> bool:
        judged_apart = signal.name in self._calibrated or signal.reference in OF_THE_SCALER
        return signal.kind in (LEVEL, RATIO) and not judged_apart

    def judge(self, readings: Sequence[HostReading]) -> dict[str, Breach]:
        readings = [reading for reading in readings if reading.step > self._warmup_steps]
        scores, breaches = self._own.z(readings), {}
        for reading in readings:
            signs = SIGNS[reading.signal.bad]
            level = self._levels.of(reading, len(signs))
            z = scores.get(reading.signal.name)
            if z is None:
                continue
            threshold = student_threshold(level)
            sides = [sign * z for sign in signs]
            if any((side > threshold).any() for side in sides):
                breaches[reading.signal.name] = worst_of(sides, signs, threshold)
        return breaches

    def per_million_steps(self, step: int) -> None:
        return None


def worst_of(sides: Sequence[np.ndarray], signs: Sequence[float], threshold: float) -> Breach:
    """The breach of the largest z-score. sides: (layers, heads) each, as they are bad above; one is not NaN."""
    every = np.stack(sides)
    side, index = divmod(int(np.nanargmax(every)), every[0].size)
    return Breach(index, float(every[side].flat[index]), threshold, "above" if signs[side] > 0 else "below")
