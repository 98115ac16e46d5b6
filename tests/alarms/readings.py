"""Readings by hand, and saved ones told again as a live watch would see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from foreshock.alarms.event import Event
from foreshock.alarms.outlets import Outlets
from foreshock.alarms.panel import Panel
from foreshock.alarms.reading import HostReading
from foreshock.alarms.settings import AlarmRules
from foreshock.experiments.trace import Trace
from foreshock.monitors.signal import Signal


def reading(signal: Signal, step: int, *values: float, undefined: bool = False) -> HostReading:
    """values: of one layer's heads."""
    x = np.array([values], float)
    return HostReading.of(signal, step, x, np.full(x.shape, undefined))


def told_again(run: Trace, names: list[str]) -> Iterator[tuple[int, list[HostReading]]]:
    """A saved run's readings of some signals, step by step."""
    by_step: dict[int, list[HostReading]] = {}
    for name in names:
        series, signal = run.signals[name], run.described[name]
        for i, step in enumerate(series.steps.tolist()):
            by_step.setdefault(step, []).append(
                HostReading.of(signal, step, series.values[i], series.undefined[i]),
            )
    yield from sorted(by_step.items())


def panel(
    *signals: Signal,
    settings: AlarmRules | None = None,
    run: str = "my-run",
    scaler: Any = None,
    model: Mapping[str, Any] | None = None,
    terminal: TextIO | None = None,
    **outlets: Any,
) -> Panel:
    """A panel of these signals that prints nothing, but for a terminal; outlets: of ``Outlets``."""
    named = {signal.name: ("some_monitor", signal) for signal in signals}
    return Panel(settings or AlarmRules(), named, run, Outlets(terminal=terminal, **outlets), scaler, model)


def events_of(panel: Panel, signal: Signal, values, every: int = 1) -> list[Event]:
    """Of a signal that reads these values one after the other."""
    return [event for i, x in enumerate(values, 1) for event in panel.read(every * i, [reading(signal, every * i, x)])]
