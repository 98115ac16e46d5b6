"""Readings as MLflow metrics, alarms as lines of an artifact."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from foreshock.alarms.event import Event
from foreshock.writers.base import missing

NOT_IN_A_NAME = re.compile(r"[^\w\-. /:]")


class MLflow:
    """Metrics ``foreshock/<signal>`` of a new run, the number of alarms by severity as ``foreshock/alarms/<severity>``,
    and every alarm a line of the artifact ``alarms.jsonl``.

    experiment: its name; tracking_uri: of the server, or a folder (``file:mlruns``); None for MLflow's own setting;
    run_id: of the run, once it is open.
    Raises ImportError without the package ``mlflow`` or ``mlflow-skinny``.
    """

    def __init__(self, experiment: str = "foreshock", tracking_uri: str | None = None) -> None:
        try:
            from mlflow.entities import Metric
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise missing("mlflow-skinny", "mlflow") from None
        self._metric, self._client_of = Metric, MlflowClient
        self._experiment, self._uri = experiment, tracking_uri
        self._events: list[Event] = []

    def open(self) -> None:
        self._client = self._client_of(self._uri)
        known = self._client.get_experiment_by_name(self._experiment)
        at = known.experiment_id if known is not None else self._client.create_experiment(self._experiment)
        self.run_id: str = self._client.create_run(at).info.run_id

    def add(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(self._name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def alarm(self, event: Event) -> None:
        self._events.append(event)
        count = sum(other.severity == event.severity for other in self._events)
        self._client.log_metric(self.run_id, f"foreshock/alarms/{event.severity}", count, step=event.step)
        self._client.log_text(self.run_id, "".join(f"{event.json()}\n" for event in self._events), "alarms.jsonl")

    def close(self) -> None:
        self._client.set_terminated(self.run_id)

    @staticmethod
    def _name(signal: str) -> str:
        return f"foreshock/{NOT_IN_A_NAME.sub('_', signal)}"
