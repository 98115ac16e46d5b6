"""An alarm as an event: a line of JSON, a line on the terminal, the argument of a callback."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

UNKNOWN = "unknown"
"""In place of a false-alarm rate that a rule does not have."""


class TrainingAlarm(RuntimeError):
    """Raised out of ``watch.step`` by the action ``raise``. event: what it is about."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.line())
        self.event = event


@dataclass(frozen=True, kw_only=True)
class Event:
    """One alarm.

    run: its name; step: of the reading; rule: that was broken (``foreshock.alarms.rules``), ``reported`` or ``watch``;
    monitor, signal, family, law: of the reading; signal is the kind of event for the last two rules, which have no
    monitor. layer, head: of the worst value, None where a signal has no such axis.
    value: the reading; statistic, threshold: what the rule compares, the reading itself for all rules but those that
    chart z-scores; side: ``above``, ``below``, ``not 0``, ``not finite``, or ``""``.
    expected_false_alarms_per_million_steps: of the rule, over all signals that it judges, at this step; ``unknown``
    where the rule has no rate. severity: ``SEV0`` to ``SEV2``; runbook: a path in the project; message: one line.
    """

    run: str
    step: int
    rule: str
    signal: str
    severity: str
    runbook: str
    monitor: str | None = None
    family: str | None = None
    law: str | None = None
    layer: int | None = None
    head: int | None = None
    value: float | None = None
    statistic: float | None = None
    threshold: float | None = None
    side: str = ""
    expected_false_alarms_per_million_steps: float | str = UNKNOWN
    message: str = ""

    def json(self) -> str:
        """One line; a number that is not finite is a text, ``"nan"`` or ``"inf"``."""
        return json.dumps({key: _plain(value) for key, value in asdict(self).items()}, allow_nan=False)

    def line(self) -> str:
        """For the terminal."""
        place = "".join(f" {name} {at}" for name, at in (("layer", self.layer), ("head", self.head)) if at is not None)
        read = "" if self.value is None else f" = {self.value:.4g}"
        limit = "" if self.threshold is None else f", {self.rule} {self.side} {self.threshold:.4g}"
        if self.threshold is not None and self.statistic is not None and self.statistic != self.value:
            limit += f" at {self.statistic:.4g}"
        law = "" if self.law is None else f" ({self.law})"
        said = f": {self.message}" if self.message else ""
        rule = "" if self.threshold is not None else f", {self.rule}{f' {self.side}' if self.side else ''}"
        return f"{self.severity} step {self.step}: {self.signal}{law}{place}{read}{limit}{rule}{said}; {self.runbook}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
