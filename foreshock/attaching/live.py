"""What is done with readings as they come: alarms judge them, writers hand them on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foreshock.alarms.event import Event
from foreshock.alarms.outlets import Outlets
from foreshock.alarms.panel import Panel
from foreshock.alarms.reading import on_host
from foreshock.alarms.settings import AlarmRules, actions_of
from foreshock.attaching.options import Options
from foreshock.monitors.base import Monitor, Reading, described_signals
from foreshock.writers.base import Writer, scalars


class Live:
    """Alarms and writers of one run, whose name is ``run``; model: its ``model_facts``.

    With either of them, each step that has readings copies them to the host once. Raises what a writer does that cannot
    be opened.
    """

    def __init__(
        self, options: Options, monitors: Mapping[str, Monitor], run: str, model: Mapping[str, Any] | None = None
    ) -> None:
        described = {
            signal.name: (name, signal) for name, monitor in monitors.items() for signal in described_signals(monitor)
        }
        self._signals = {name: signal for name, (_, signal) in described.items()}
        self._writers = list(options.writers)
        self.panel: Panel | None = None
        rules = AlarmRules.of(options.alarms)
        if rules is not None:
            outlets = Outlets(
                folder=None if options.out is None else Path(options.out),
                terminal=None if options.quiet else sys.stderr,
                on_alarm=(*options.alarm_listeners, self._write_alarm),
                actions=actions_of(options.actions),
            )
            self.panel = Panel(rules, described, run, outlets, options.scaler, model)

    def open_writers(self) -> None:
        """Where one raises, those that are open already are closed, and it is raised."""
        opened: list[Writer] = []
        try:
            for writer in self._writers:
                writer.open()
                opened.append(writer)
        except BaseException:
            for writer in opened:
                writer.close()
            raise

    def read(self, step: int, readings: Mapping[str, Reading], batch: Any, proven: bool = True) -> None:
        """batch: the rows that the watch keeps; proven: as of ``Panel.read``.

        Raises TrainingAlarm where an action asks for it.
        """
        if self.panel is None and not self._writers:
            return
        found = on_host(step, readings, self._signals)
        values = scalars(found) if self._writers else {}
        if found:
            self._each(step, lambda writer: writer.add(step, values))
        if self.panel is not None:
            self.panel.read(step, found, batch, proven)

    def own(self, step: int, kind: str, message: str) -> None:
        """Something befell the watch (``alarms.severity``); raises nothing."""
        if self.panel is not None:
            self.panel.own(step, kind, message)

    def raise_kept(self) -> None:
        """Raises TrainingAlarm where an action asked for it outside ``read``."""
        if self.panel is not None:
            self.panel.raise_kept()

    def close(self, step: int) -> None:
        self._each(step, lambda writer: writer.close())

    def _write_alarm(self, event: Event) -> None:
        self._each(event.step, lambda writer: writer.alarm(event))

    def _each(self, step: int, call: Callable[[Writer], Any]) -> None:
        """Of every writer; one that raises is left out from then on, and training goes on."""
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:
                self._writers.remove(writer)
                self.own(
                    step, "writer_failed", f"{type(writer).__name__} is switched off: {type(error).__name__}: {error}"
                )
