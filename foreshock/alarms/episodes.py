"""One event for an episode of alarms, not one for every reading of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foreshock.alarms.severity import Row, more_severe

REARM_READINGS = 10
"""So many readings of a signal in a row that do not break the rule end its episode: W of the self track."""


@dataclass
class Episode:
    """An alarm that goes on. severity: as last told; first: the reading it began with; readings: that broke the rule,
    the last ones in a row; clear: readings since then."""

    severity: str
    first: float
    readings: int = 1
    clear: int = 0


class Episodes:
    """The re-arm rule, for each rule and signal by itself.

    An episode begins with a breach, which is told, and ends after ``REARM_READINGS`` readings in a row without one; the
    next breach begins another. Inside an episode an alarm is told again only where it has become more severe.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[str, str], Episode] = {}

    def clear(self, rule: str, signal: str) -> None:
        """A reading that does not break the rule."""
        episode = self._open.get((rule, signal))
        if episode is not None:
            episode.readings, episode.clear = 0, episode.clear + 1
            if episode.clear >= REARM_READINGS:
                del self._open[rule, signal]

    def tell(self, rule: str, signal: str, value: float, row: Callable[[int, float | None], Row]) -> Row | None:
        """A reading that breaks the rule: the row of the severity to tell, or None where it is told already.

        row: from the readings in a row that broke it, and the reading of the episode's first alarm.
        """
        episode = self._open.get((rule, signal))
        if episode is None:
            now = row(1, None)
            self._open[rule, signal] = Episode(now.severity, value)
            return now
        episode.readings, episode.clear = episode.readings + 1, 0
        now = row(episode.readings, episode.first)
        if not more_severe(now.severity, episode.severity):
            return None
        episode.severity = now.severity
        return now
