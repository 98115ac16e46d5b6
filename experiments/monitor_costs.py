"""What watching costs a training step: every monitor at its own cadence, its copies of weights, and the taps.

A share is of the median step. A reading is timed from an idle device to an idle device, so that what waits for the
device is in it; what the host could have hidden behind a busy device is too: these are upper bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from foreshock.experiments.gpt2_training import Training, in_turns, seconds
from foreshock.experiments.gpu_record import first_line
from foreshock.monitors.base import Monitor, StepView, WeightHistory, cadences, tapped
from foreshock.monitors.cadence import Cadence, period
from foreshock.monitors.watch import Watch

TURNS = 5
LONG_S = 0.5
"""A reading that takes longer is timed once."""

WARM_UP_STEPS = 120
"""Steps seen before a reading by monitors that see every step: with fewer, a spike score has no past to judge by."""


def cadences_of(monitors: Mapping[str, Monitor]) -> list[Cadence]:
    """Those of all monitors' signals."""
    return [cadence for monitor in monitors.values() for cadence in cadences(monitor)]


def filled_watch(training: Training, monitors: Mapping[str, Monitor], now: int) -> Watch:
    """A watch with the weights of all steps that a reading at ``now`` asks for, one update apart."""
    watch = Watch(training.engine.anatomy, training.engine.optimizer, monitors)
    for steps in sorted({lookback.steps for m in monitors.values() for lookback in m.needs.history}, reverse=True):
        watch.record(now - steps)
        training.step(now - steps)
    return watch


def history_seconds(training: Training, monitors: Mapping[str, Monitor]) -> float:
    """Of the copies of weights, a step, over the period of those who ask for them."""
    lookbacks = [lookback for monitor in monitors.values() for lookback in monitor.needs.history]
    steps = period(lookback.cadence for lookback in lookbacks)
    history = WeightHistory(lookbacks)
    spent = [seconds(partial(history.record, s, training.engine.anatomy), training.device) for s in range(2 * steps)]
    return sum(spent[steps:]) / steps


def warm_up(monitor: Monitor, view: StepView) -> None:
    """Let a monitor that sees every step see enough of them."""
    if cadences(monitor)[0].every_steps == 1:
        for step in range(view.step - WARM_UP_STEPS, view.step):
            monitor.observe(replace(view, step=step))


def reading_seconds(monitor: Monitor, view: StepView, device: torch.device) -> float:
    """The median of a few readings of one step, the first of which does not count."""
    warm_up(monitor, view)
    first = seconds(lambda: monitor.observe(view), device)
    turns = 1 if first > LONG_S else TURNS
    return median(seconds(lambda: monitor.observe(view), device) for _ in range(turns))


def monitor_seconds(monitor: Monitor, view: StepView, device: torch.device) -> dict[str, float]:
    """``reading_s``, with every signal due as at the view's step; ``mean_s``, over the steps of a cadence."""
    fastest, *_, slowest = (*cadences(monitor), cadences(monitor)[-1])
    reading = reading_seconds(monitor, view, device)
    soon = replace(view, step=fastest.next_after(view.step))
    between = reading_seconds(monitor, soon, device) if fastest < slowest else 0.0
    slow, fast = (1 / cadence.every_steps for cadence in (slowest, fastest))
    return {"reading_s": reading, "mean_s": reading * slow + between * (fast - slow)}


def taps_seconds(training: Training, monitors: Mapping[str, Monitor]) -> float:
    """Of tapping, a step: what the watched sequences take longer, for the places tapped at each step of a period."""
    due = Counter(
        tapped(m for m in monitors.values() if any(cadence.is_due(step) for cadence in cadences(m)))
        for step in range(period(cadences_of(monitors)))
    )
    calls = {places: partial(training.backward_watched, places) for places in {frozenset(), *due}}
    for call in calls.values():
        call()
    taken = in_turns(calls, training.device, TURNS)
    return sum((taken[places] - taken[frozenset()]) * count for places, count in due.items()) / due.total()


def watched_step(training: Training, watch: Watch, now: int) -> StepView:
    """What monitors see after a step that makes ``now`` updates, all their places tapped."""
    view = training.step(now - 1, watch.places(watch.due(now)))
    watch.record(now)
    return watch.seen(view)


def monitor_costs(training: Training, monitors: Mapping[str, Monitor]) -> dict[str, Any]:
    """Everything that the monitors add to a step, as shares of it; a monitor that raises is there with its error."""
    device, now = training.device, period(cadences_of(monitors))
    watch = filled_watch(training, monitors, now)
    step_s = in_turns({"step": partial(training.step, now)}, device, TURNS)["step"]
    shares = {
        "taps": taps_seconds(training, monitors) / step_s,
        "history": history_seconds(training, monitors) / step_s,
    }
    view, errors, readings = watched_step(training, watch, now), {}, {}
    for name, monitor in monitors.items():
        try:
            found = monitor_seconds(monitor, view, device)
        except Exception as error:
            errors[name] = first_line(error)
        else:
            readings[name] = 1e3 * found["reading_s"]
            shares[name] = found["mean_s"] / step_s
    dearest_first = dict(sorted(shares.items(), key=lambda item: -item[1]))
    return {
        "ok": not errors,
        "step_ms": 1e3 * step_s,
        "share_of_step": sum(shares.values()),
        "shares_of_step": dearest_first,
        "reading_ms": readings,
        "errors": errors,
    }
