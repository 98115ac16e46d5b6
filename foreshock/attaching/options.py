"""What ``foreshock.attach`` can be told beside the model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from foreshock.alarms.event import Event
from foreshock.alarms.settings import LOG_ONLY, SNAPSHOT, Actions, AlarmRules, actions_of
from foreshock.models.anatomies.structure import nearest
from foreshock.monitors.base import Reading
from foreshock.writers.base import Writer

PROFILES: Mapping[str, tuple[str, ...]] = {
    "icu": (
        "attention_scores",
        "gradient_norm",
        "loss",
        "loss_scale",
        "non_finite",
        "tokens",
        "update_to_weight",
    ),
    "laws": ("attention_laws", "attention_recomputed", "linear_laws", "logit_laws", "norm_laws", "router_laws"),
    "all": ("*",),
}
"""By name, patterns of monitors. ``icu``: the numbers of each step; ``laws``: broken kernels; ``all``: what fits."""

WRITER = ("open", "add", "alarm", "close")
"""Methods of a writer."""

OnReadings = Callable[[int, Mapping[str, Reading]], Any]
"""Called with the step and its readings by signal, on the device, after every step that has any."""

OnAlarm = Callable[[Event], Any]
"""Called with every alarm."""


class Given(TypedDict, total=False):
    """The keywords of ``foreshock.attach``, as ``Options`` has them."""

    monitors: str | Sequence[str] | None
    profile: str
    every_steps: int | None
    rows: int | None
    scaler: Any
    out: str | Path | None
    on_readings: OnReadings | Sequence[OnReadings]
    anatomy: Mapping[str, str | int] | None
    quiet: bool
    alarms: bool | str | Path | AlarmRules
    on_alarm: OnAlarm | Sequence[OnAlarm]
    actions: Actions
    writers: Sequence[Writer]


@dataclass(frozen=True)
class Options:
    """monitors: names or patterns (``*_laws``), None for those of the profile.

    profile: of ``PROFILES``; every_steps: the cadence of every monitor that need not read each step, None for its own.
    rows: so many of a batch's last rows are kept for what is computed again (the curvature of the objective, a compiled
    model's taps), None for all. scaler: the GradScaler, if any; out: a new folder for trace and manifest.
    on_readings: functions of a step and its readings; anatomy: roles of a model that is not recognised
    (``models.anatomies.by_hand``); quiet: whether to print nothing.
    alarms: True for the rules that need no healthy run, False for none, a file of ``foreshock calibrate``, or
    ``foreshock.AlarmRules``; on_alarm: functions of an alarm; actions: ``log_only``, ``snapshot``, ``raise`` or
    functions of an alarm, for all or by severity (``docs/alarms.md``); writers: of ``foreshock.writers``.

    Raises ValueError that names the option.
    """

    monitors: str | Sequence[str] | None = None
    profile: str = "all"
    every_steps: int | None = None
    rows: int | None = 2
    scaler: Any = None
    out: str | Path | None = None
    on_readings: OnReadings | Sequence[OnReadings] = ()
    anatomy: Mapping[str, str | int] | None = None
    quiet: bool = False
    alarms: bool | str | Path | AlarmRules = True
    on_alarm: OnAlarm | Sequence[OnAlarm] = ()
    actions: Actions = LOG_ONLY
    writers: Sequence[Writer] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Raises TypeError for an unknown option, with the nearest one."""
        names = [field.name for field in fields(cls)]
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise TypeError(f"attach({unknown}=...) is not allowed: one of {', '.join(names)}{nearest(unknown, names)}")
        return cls(**given)

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            known = f"one of {', '.join(PROFILES)}{nearest(self.profile, PROFILES)}"
            raise ValueError(f"profile={self.profile!r} is not allowed: {known}")
        for name in ("every_steps", "rows"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} is not allowed: a whole number from 1, or None")
        self._check_effects()
        for name in ("unscale_", "get_scale"):
            if self.scaler is not None and not hasattr(self.scaler, name):
                raise ValueError(f"scaler={type(self.scaler).__name__} is not allowed: a torch.amp.GradScaler")
        if not isinstance(self.writers, Sequence):
            raise ValueError(f"writers={type(self.writers).__name__} is not allowed: a list of writers")
        for writer in self.writers:
            lacking = next((name for name in WRITER if not callable(getattr(writer, name, None))), None)
            if lacking is not None:
                said = f"it has no {lacking}(): a writer has {', '.join(WRITER)} (foreshock.writers.Writer)"
                raise ValueError(f"writers={type(writer).__name__} is not allowed: {said}")
        AlarmRules.of(self.alarms)
        actions_of(self.actions)

    def _check_effects(self) -> None:
        """Raises ValueError for an option that another one leaves without effect."""
        if self.monitors is not None and self.profile != "all":
            raise ValueError(f"profile={self.profile!r} has no effect beside monitors=: give one of the two")
        if self.alarms is False and self.alarm_listeners:
            raise ValueError("on_alarm has no effect with alarms=False")
        if self.alarms is False and any(
            action != LOG_ONLY for of in actions_of(self.actions).values() for action in of
        ):
            raise ValueError("actions has no effect with alarms=False")

    def of_rank(self, rank: int) -> Options:
        """Those of a process of a distributed training: the first alone writes a folder, has writers, and prints."""
        if rank == 0:
            return self
        actions = {
            severity: tuple(action for action in asked if action != SNAPSHOT)
            for severity, asked in actions_of(self.actions).items()
        }
        return replace(self, out=None, quiet=True, actions=actions, writers=())

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the monitors that are asked for."""
        if self.monitors is None:
            return PROFILES[self.profile]
        return (self.monitors,) if isinstance(self.monitors, str) else tuple(self.monitors)

    @property
    def listeners(self) -> tuple[OnReadings, ...]:
        return (self.on_readings,) if callable(self.on_readings) else tuple(self.on_readings)

    @property
    def alarm_listeners(self) -> tuple[OnAlarm, ...]:
        return (self.on_alarm,) if callable(self.on_alarm) else tuple(self.on_alarm)
