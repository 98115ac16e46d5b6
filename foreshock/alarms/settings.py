"""What ``foreshock.attach`` can be told of alarms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreshock.alarms.budget import Budget
from foreshock.alarms.event import Event
from foreshock.alarms.severity import SEVERITIES
from foreshock.experiments.validation import check_named

RULES = ("non_finite", "exact", "universal", "self", "published")
"""Rules that need no healthy run."""

Action = str | Callable[[Event], Any]
Actions = Action | Sequence[Action] | Mapping[str, Action | Sequence[Action]]

LOG_ONLY, SNAPSHOT, RAISE = "log_only", "snapshot", "raise"
ACTIONS = (LOG_ONLY, SNAPSHOT, RAISE)


@dataclass(frozen=True)
class AlarmRules:
    """Which rules judge, and how strictly.

    rules: of ``RULES``; alpha: of each rule that has a rate, the probability that a healthy run alarms; warmup_steps:
    of the learning rate, which the rule ``self`` leaves out (2,000 is that of Llama, arXiv:2302.13971); horizon_steps:
    the planned length of the run, None where it is not known (``foreshock.alarms.budget``); thresholds: a file of
    ``foreshock calibrate``, whose signals leave the rule ``self``.

    Raises ValueError that names the field.
    """

    rules: tuple[str, ...] = RULES
    alpha: float = 0.05
    warmup_steps: int = 2000
    horizon_steps: int | None = None
    thresholds: str | Path | None = None

    def __post_init__(self) -> None:
        check_named(self.rules, RULES, "alarms.rules")
        Budget(self.alpha, self.horizon_steps)
        if self.warmup_steps < 0:
            raise ValueError(f"alarms.warmup_steps={self.warmup_steps} is not allowed: 0 or more")

    @property
    def budget(self) -> Budget:
        return Budget(self.alpha, self.horizon_steps)

    @classmethod
    def of(cls, given: bool | str | Path | AlarmRules) -> AlarmRules | None:
        """From the option ``alarms``: True, False, a file of thresholds, or rules. Raises ValueError on others."""
        if isinstance(given, bool):
            return cls() if given else None
        if isinstance(given, (str, Path)):
            return cls(thresholds=given)
        if not isinstance(given, cls):
            raise ValueError(f"alarms={given!r} is not allowed: True, False, a file of thresholds, or AlarmRules")
        return given


def actions_of(given: Actions) -> dict[str, tuple[Action, ...]]:
    """By severity, what an alarm does beside its line. Raises ValueError that names what is not allowed."""
    if isinstance(given, Mapping):
        check_named(given, SEVERITIES, "actions")
        return {severity: _several(given.get(severity, ())) for severity in SEVERITIES}
    return dict.fromkeys(SEVERITIES, _several(given))


def _several(given: Action | Sequence[Action]) -> tuple[Action, ...]:
    actions: tuple[Action, ...] = (given,) if isinstance(given, str) or callable(given) else tuple(given)
    check_named([action for action in actions if not callable(action)], ACTIONS, "actions")
    return actions
