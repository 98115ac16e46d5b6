"""Readings as Weights & Biases metrics, alarms as its alerts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from foreshock.alarms.event import Event
from foreshock.writers.base import missing

LEVELS = {"SEV0": "ERROR", "SEV1": "WARN", "SEV2": "INFO"}
"""By severity, wandb's own."""


class WeightsAndBiases:
    """Metrics ``foreshock/<signal>`` over ``foreshock/step``, alarms as ``wandb.alert`` and in the metric
    ``foreshock/alarms/<severity>``, their number so far.

    project: of a new run; run: one that goes on already, in place of it; options: of ``wandb.init``, such as
    ``mode="offline"`` and ``dir=``. A run of its own begins with ``open`` and is finished by ``close``.
    Raises ImportError without the package ``wandb``, ValueError without project and run.
    """

    def __init__(self, project: str | None = None, *, run: Any = None, **options: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise missing("wandb", "wandb") from None
        if project is None and run is None:
            raise ValueError("WeightsAndBiases(): project= or run= is needed")
        self._own, self.run = run is None, run
        self._begin = partial(wandb.init, project=project, **options)
        self._alarms = dict.fromkeys(LEVELS, 0)

    def open(self) -> None:
        if self._own:
            self.run = self._begin()
        self.run.define_metric("foreshock/step")
        self.run.define_metric("foreshock/*", step_metric="foreshock/step")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"foreshock/step": step} | {f"foreshock/{name}": value for name, value in values.items()})

    def alarm(self, event: Event) -> None:
        self._alarms[event.severity] += 1
        count = self._alarms[event.severity]
        self.run.log({"foreshock/step": event.step, f"foreshock/alarms/{event.severity}": count})
        self.run.alert(title=f"{event.severity} {event.signal}", text=event.line(), level=LEVELS[event.severity])

    def close(self) -> None:
        if self._own:
            self.run.finish()
