"""A watch: the monitors of a training, the weights that they look back to, when each is due, and what they read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from foreshock.models.anatomy import Anatomy
from foreshock.monitors.base import (
    Monitor,
    Reading,
    StepView,
    WeightHistory,
    cadences,
    due_readings,
    state_of,
    tapped,
)


class Watch:
    """The monitors of one training loop.

        watch.record(0)                                # before the first step
        names = watch.due(step)
        view = ...                                     # of the step, with watch.places(names) tapped
        watch.record(step)
        readings = watch.observe(view, names)

    anatomy: of the model that is trained; optimizer: its own, None where monitors may not see it; monitors: by name.
    Nothing here changes the model. Raises ValueError for a monitor that needs what these do not have.
    """

    def __init__(
        self, anatomy: Anatomy, optimizer: torch.optim.Optimizer | None, monitors: Mapping[str, Monitor]
    ) -> None:
        check_needs(anatomy, optimizer, monitors)
        self._anatomy, self._optimizer, self._monitors = anatomy, optimizer, monitors
        self.history = WeightHistory(lookback for monitor in monitors.values() for lookback in monitor.needs.history)
        self._cadences = {name: cadences(monitor) for name, monitor in monitors.items()}

    def due(self, step: int) -> list[str]:
        """The monitors that have a signal due at a step."""
        return [name for name, every in self._cadences.items() if any(cadence.is_due(step) for cadence in every)]

    def places(self, names: Iterable[str]) -> frozenset[str]:
        """What has to be tapped for these monitors."""
        return tapped(self._monitors[name] for name in names)

    def record(self, step: int) -> None:
        """Copy those of this step's weights that a later reading needs."""
        self.history.record(step, self._anatomy)

    def seen(self, view: StepView) -> StepView:
        """The view of an engine with what the watch adds to it: history and optimizer."""
        return replace(view, history=self.history, optimizer=self._optimizer)

    def observe(self, view: StepView, names: Iterable[str], runs: Collection[int] = (0,)) -> dict[str, Reading]:
        """What the named monitors read, of the signals that are due.

        Of a step that is skipped for its overflow, only monitors of the loss scale read: its gradients are not finite,
        and no update follows. runs: those that are still recorded, for a watch of several
        (``experiments.training.stacked_watch``).
        """
        if view.skipped:
            names = [name for name in names if self._monitors[name].needs.scaled]
        seen = self.seen(view)
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


def check_needs(anatomy: Anatomy, optimizer: torch.optim.Optimizer | None, monitors: Mapping[str, Monitor]) -> None:
    """Raises ValueError that names the first monitor to lack something, and what."""
    for name, monitor in monitors.items():
        lacking = monitor.needs.lacking(anatomy)
        if lacking is not None:
            raise ValueError(f"monitor.{name} needs the role {lacking!r}, and the model has none: leave it out")
        if optimizer is None and "optimizer" in monitor.needs.view:
            raise ValueError(f"monitor.{name} needs the optimizer, and the watch has none: leave it out")


def load_memory(monitors: Mapping[str, Any], memory: Mapping[str, Any]) -> None:
    """Give each monitor the memory that a checkpoint has of it; one without memory has None there."""
    for name, monitor in monitors.items():
        if memory[name] is not None:
            monitor.load_state_dict(memory[name])
