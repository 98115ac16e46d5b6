"""A detector that was not written here: anyone's own file.

A detector is a Python file with a function ``statistic(x)``: x is (T,) float, positive is bad, NaN a missing
sample; it returns (T,), larger is worse, and must be causal: statistic(x[:t]) equals statistic(x)[:t]. Two names are
optional: ``signals``, a list of signals that share its threshold (default: those of the first baseline), and
``calibrate(healthy)``, which may return anything that has a ``statistic`` (healthy: series of reference runs).
It runs in a process of its own, in an empty folder, within a limit of time and of memory (``detect.isolation``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foreshock.analysis.detect.charts import AlarmRule
from foreshock.analysis.detect.isolation import DEFAULT_LIMITS, Failed, Limits, Worker


class BadEntrant(ValueError):
    """A detector that cannot enter: it looks ahead, raises, or returns something else than a statistic."""


@dataclass(frozen=True)
class FromFile:
    """A rule made of a file's functions, which run in a process of their own; what comes back is checked.

    number: of the rule in that process.
    """

    worker: Worker
    number: int = 0

    def calibrate(self, healthy: Sequence[np.ndarray]) -> AlarmRule:
        try:
            return FromFile(self.worker, self.worker.calibrate(healthy))
        except Failed as reason:
            raise BadEntrant(str(reason)) from None

    def statistic(self, x: np.ndarray) -> np.ndarray:
        try:
            values = self.worker.statistic(self.number, x)
        except Failed as reason:
            raise BadEntrant(str(reason)) from None
        # A detector that loses an infinite sample, or its own mind, must not fall silent; it may need a while to start.
        infinite = np.maximum.accumulate(np.isposinf(x))
        lost = np.isnan(values) & ~np.isnan(x) & np.maximum.accumulate(~np.isnan(values))
        return np.where(infinite | np.maximum.accumulate(lost), np.inf, values)


@dataclass(frozen=True)
class Entrant:
    """Somebody's detector: its name (the file's), its signals (empty: the baseline's) and its rule."""

    name: str
    signals: tuple[str, ...]
    rule: AlarmRule


@contextmanager
def entrant_of(path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[Entrant]:
    """The detector in a Python file, its process alive within the context.

    Raises ValueError where there is no such file, or it cannot be loaded within the limits as a detector.
    """
    if not path.is_file():
        raise ValueError(f"detector={path} is not a Python file")
    try:
        worker = Worker(path, limits)
    except Failed as reason:
        raise ValueError(f"detector={path} cannot be loaded: {reason}") from None
    with worker:
        yield Entrant(path.stem, worker.signals, FromFile(worker))


CUTS = 8
"""Prefixes of every run at which a stranger's statistic is computed again."""


def check_causal(rule: AlarmRule, x: np.ndarray, also: Sequence[int] = ()) -> None:
    """Raises BadEntrant where the statistic of a series' beginning depends on what comes after it.

    x: (T,). Looks at ``CUTS`` prefixes, at those that end with the samples ``also`` (an alarm, a maximum), at each with
    another future as well.
    """
    whole = rule.statistic(x)
    cuts = {len(x) * i // CUTS for i in range(1, CUTS)} | {i + 1 for i in also}
    for t in sorted(cuts - {0, len(x)}):
        for series in (x[:t], np.concatenate((x[:t], -3.0 * x[t:] + 7.0))):
            early = rule.statistic(series)[:t]
            changed = np.flatnonzero(~np.isclose(early, whole[:t], rtol=1e-9, atol=1e-12, equal_nan=True))
            if len(changed):
                raise BadEntrant(f"it looks ahead: its statistic at sample {changed[0]} changes with what follows {t}")
