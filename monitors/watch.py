"""A watch: the monitors of a training, the weights that they look back to, when each is due, and what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from foreshock.monitors.base import Monitor, Reading, StepView, WeightHistory, due_readings, state_of, tapped


class Watch:
    """The monitors of one training loop.

        watch.record(0)                                # before the first step
        names = watch.due(step)
        view = ...                                     # of the step, with watch.places(names) tapped
        watch.record(step)
        readings = watch.observe(view, names)

    model: whose weights the history copies; monitors: by name. Nothing here changes the model.
    """

    def __init__(self, model: nn.Module, monitors: Mapping[str, Monitor]) -> None:
        self._model, self._monitors = model, monitors
        self.history = WeightHistory(lookback for monitor in monitors.values() for lookback in monitor.needs.history)
        self._cadences = {name: cadences(monitor) for name, monitor in monitors.items()}

    def due(self, step: int) -> list[str]:
        """The monitors that have a signal due at a step."""
        return [name for name, every in self._cadences.items() if is_due(step, every)]

    def places(self, names: Iterable[str]) -> frozenset[str]:
        """What has to be tapped for these monitors."""
        return tapped(self._monitors[name] for name in names)

    def record(self, step: int) -> None:
        """Copy those of this step's weights that a later reading needs."""
        self.history.record(step, self._model)

    def observe(self, view: StepView, names: Iterable[str], runs: Collection[int] = (0,)) -> dict[str, Reading]:
        """What the named monitors read, of the signals that are due.

        runs: those that are still recorded, for a watch of several (``experiments.training.stacked_watch``).
        """
        seen = replace(view, history=self.history)
        readings: dict[str, Reading] = {}
        for name in names:
            readings |= due_readings(self._monitors[name], view.step, self._monitors[name].observe(seen))
        return readings

    def state_of(self, run: int = 0) -> dict[str, Any]:
        """What a checkpoint of one run needs: ``history`` and the ``monitors``' memory."""
        memory = {name: state_of(monitor) for name, monitor in self._monitors.items()}
        return {"history": self.history.state_dict(), "monitors": memory}

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from these states, one a run."""
        (state,) = states
        self.history.load_state_dict(state["history"])
        load_memory(self._monitors, state["monitors"])


def cadences(monitor: Monitor) -> tuple[int, ...]:
    """The steps between two readings of a monitor's signals, each once, in order."""
    return tuple(sorted({signal.every_steps for signal in monitor.signals}))


def is_due(step: int, every: Iterable[int]) -> bool:
    """Whether a step is a multiple of any of these cadences."""
    return any(step % steps == 0 for steps in every)


def load_memory(monitors: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
    """Give each monitor the memory that a checkpoint has of it; one without memory has None there."""
    for name, monitor in monitors.items():
        if memory[name] is not None:
            monitor.load_state_dict(memory[name])
