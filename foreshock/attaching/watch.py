"""The watch of a training loop that is not ours."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreshock.alarms.event import Event, TrainingAlarm
from foreshock.alarms.overflow import is_enabled, skips
from foreshock.alarms.proven import is_proven
from foreshock.alarms.terminal import in_one_line, say
from foreshock.attaching.due import Due
from foreshock.attaching.live import Live
from foreshock.attaching.model_facts import model_facts
from foreshock.attaching.options import Options
from foreshock.attaching.sight import Sight
from foreshock.attaching.view import view_of
from foreshock.attaching.writer import TraceWriter
from foreshock.models.anatomy import Anatomy
from foreshock.monitors.base import LossScaling, Monitor, Reading, StepView
from foreshock.monitors.watch import Watch


class AttachedWatch:
    """What ``foreshock.attach`` returns. Call ``step`` after each ``optimizer.step()``; a context manager closes it.

    steps: how often ``step`` was called; readings: of the last step that had any, by signal, on the device; seen: the
    last step of each signal that has had a reading;
    monitors: names of those that read; declined: by monitor, or ``<monitor>.over_noise``, why it does not read;
    tracebacks: of monitors and functions of readings that raised and were switched off; stopped: why the watch has
    stopped itself, or None;
    alarms: the events so far.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        optimizer: torch.optim.Optimizer,
        monitors: Mapping[str, Monitor],
        options: Options,
        declined: Mapping[str, str],
        nodes: Mapping[str, Any],
    ) -> None:
        self.anatomy, self.steps, self.stopped = anatomy, 0, None
        self.readings: dict[str, Reading] = {}
        self.seen: dict[str, int] = {}
        self._options, self._listeners = options, list(options.listeners)
        self._watch = Watch(anatomy, optimizer, monitors)
        self._due = Due(self._watch, anatomy, monitors, declined, self._news, self._befell)
        self.declined, self.tracebacks = self._due.declined, self._due.tracebacks
        self._closers: list[Callable[[], Any]] = []
        self._skipped = 0
        name = _named(anatomy) if options.out is None else Path(options.out).name
        self._live = Live(options, monitors, name, model_facts(anatomy))
        self._writer = None if options.out is None else TraceWriter(options.out, anatomy, monitors, nodes)
        self._watch.record(0)
        self._sight = Sight(anatomy, optimizer, self._wanted, options.rows, options.scaler, self._failed)
        self._live.open_writers()  # after all that can refuse

    stopped: str | None
    _closed = _reading = False
    _ended = "completed"

    @property
    def monitors(self) -> tuple[str, ...]:
        return tuple(self._due.monitors)

    @property
    def alarms(self) -> list[Event]:
        return [] if self._live.panel is None else list(self._live.panel.events)

    def report(self, kind: str, message: str = "", value: float | None = None) -> Event:
        """Raise an alarm for something that the training loop itself has seen: ``report("checkpoint_failure")``.

        kind: of ``foreshock.alarms.severity.REPORTS``. Raises ValueError for another, and where alarms are off;
        TrainingAlarm where an action asks for it.
        """
        if self._live.panel is None:
            raise ValueError("watch.report(...): alarms=False; attach with alarms=True")
        return self._live.panel.report(self.steps, kind, message, value)

    def monitor(self, name: str) -> Monitor:
        """A monitor that reads. Raises KeyError for another name."""
        return self._due.monitors[name]

    def summary(self) -> str:
        """How many monitors read, and a line for each that does not."""
        width = max((len(name) for name in self.declined), default=0)
        lines = [f"  {name:<{width}}  {reason}" for name, reason in self.declined.items()]
        declines = f", {len(lines)} decline:" if lines else ""
        return "\n".join([f"foreshock: {len(self.monitors)} monitors watch {_named(self.anatomy)}{declines}", *lines])

    def step(self, loss: Tensor | float) -> dict[str, Reading]:
        """Read the update that has just been made; its readings by signal, empty where none is due.

        A step whose gradients the GradScaler throws away has no readings, and no monitor remembers it.
        loss: of the batch, mean nats a token. Raises ValueError where no backward has reached the model since the last
        call, or after ``close``; ``foreshock.TrainingAlarm`` where an alarm's action is ``raise``, and nothing else.
        """
        if self._closed:
            raise ValueError("watch.step(loss): the watch is closed; attach again")
        if self.stopped is not None:
            self._live.raise_kept()
            return {}
        if not self._sight.backwards:
            raise ValueError(
                "watch.step(loss): no backward has reached the model since the last step: call it once an update, "
                "after loss.backward() and optimizer.step()"
            )
        self.steps += 1
        readings: dict[str, Reading] = {}
        try:
            readings = self._read(torch.as_tensor(loss).detach().to(self._sight.device))
        except TrainingAlarm:
            raise
        except Exception as error:
            self._failed(error)
        finally:
            self._sight.next_step()
        self._live.raise_kept()
        return readings

    def close(self) -> None:
        """Write what is left, and take every hook off. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as last:  # calls every closer, whatever another raises
            for closer in reversed(self._closers):
                last.callback(closer)
            self._sight.close()
            if self.stopped is None:
                self._kept(lambda writer: writer.close(self.steps, self._sight.tokens, self._ended))
            else:
                self._save_the_rest()
            self._live.close(self.steps)

    def when_closed(self, call: Callable[[], Any]) -> None:
        self._closers.append(call)

    def __enter__(self) -> AttachedWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: Any) -> None:
        if kind is not None:
            self._ended = "failed" if issubclass(kind, Exception) else "interrupted"
        self.close()

    def _wanted(self) -> tuple[frozenset[str], bool]:
        """What the next step's monitors tap, and whether one asks for routings."""
        now = self.steps + (0 if self._reading else 1)
        due = [] if self.stopped is not None else self._due.at(now)
        return self._due.places(due), self._due.routed(due)

    def _read(self, loss: Tensor) -> dict[str, Reading]:
        sight, scaler = self._sight, self._options.scaler
        assert sight.grad_norm is not None
        if skips(scaler, loss, sight.grad_norm):
            self._skipped += 1
            self._watch.record(self.steps)
            self._live.read(self.steps, {}, sight.watched)  # where a storm of them is told
            return {}
        scaling = LossScaling(float(scaler.get_scale()), self._skipped) if is_enabled(scaler) else None
        self._reading = True
        try:
            due = self._due.readable(self._due.at(self.steps), sight)
            view, due = self._view(due, loss, scaling)
            due = self._due.reached(due, view, sight)
            self._watch.record(self.steps)
            readings: dict[str, Reading] = {}
            sight.apart = True  # a monitor may call the model
            for name in due:
                readings |= self._due.observe(name, view)
        finally:
            self._reading = sight.apart = False
        if readings:
            self.readings = readings
            self.seen |= dict.fromkeys(readings, self.steps)
            self._pass_on(readings, is_proven(view.taps))
        return readings

    def _view(self, due: list[str], loss: Tensor, scaling: LossScaling | None) -> tuple[StepView, list[str]]:
        """What the step shows, and who can read it: without those whose rows cannot run again."""

        def shown() -> StepView:
            return view_of(self.steps, loss, self._sight, self._due.places(due), self._due.routed(due), scaling)

        try:
            return shown(), due
        except Exception as error:
            due = self._due.untapped(due, error)
        return shown(), due

    def _pass_on(self, readings: Mapping[str, Reading], proven: bool) -> None:
        self._kept(lambda writer: writer.add(self.steps, self._sight.tokens, readings))
        self._listened(readings)
        self._live.read(self.steps, readings, self._sight.watched, proven)

    def _listened(self, readings: Mapping[str, Reading]) -> None:
        """Call every function of readings; one that raises is left out from then on, and training goes on."""
        for listener in list(self._listeners):
            try:
                listener(self.steps, readings)
            except Exception as error:
                self._listeners.remove(listener)
                name = getattr(listener, "__name__", type(listener).__name__)
                self.tracebacks[name] = traceback.format_exc()
                reason = f"on_readings: {name} is switched off, it raised {in_one_line(error)}"
                self._news(reason)
                self._befell("listener_failed", reason)

    def _kept(self, write: Callable[[TraceWriter], Any]) -> None:
        """Write to the disk; where that fails, training goes on and the watch stops itself."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._stop("out_folder", f"its folder cannot be written: {error}")
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.tracebacks["watch"] = "".join(traceback.format_exception(error))
        self._stop("monitoring_blackout", f"{in_one_line(error)} (watch.tracebacks['watch'])")

    def _stop(self, kind: str, reason: str) -> None:
        self.stopped = reason
        self._news(f"the watch has stopped, training goes on: {reason}")
        if hasattr(self, "_sight"):
            self._sight.close()
        self._save_the_rest()
        self._befell(kind, reason)

    def _save_the_rest(self) -> None:
        """Write what a watch that has stopped has read and not written; that fails where the disk is still full."""
        if self._writer is None or self._writer.closed:
            return
        try:
            self._writer.stop(self.steps, self._sight.tokens if hasattr(self, "_sight") else 0)
        except Exception as error:
            self.tracebacks["out"] = "".join(traceback.format_exception(error))

    def _befell(self, kind: str, message: str) -> None:
        self._live.own(self.steps, kind, message)

    def _news(self, line: str) -> None:
        if not self._options.quiet:
            say(f"step {self.steps}: {line}", sys.stderr)


def _named(anatomy: Anatomy) -> str:
    return type(anatomy.model).__name__
