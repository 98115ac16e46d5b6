"""The watch of a training loop that is not ours."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreshock.alarms.event import Event, TrainingAlarm
from foreshock.alarms.overflow import skips
from foreshock.alarms.proven import is_proven
from foreshock.alarms.terminal import say
from foreshock.attaching.live import Live
from foreshock.attaching.loss_scale import loss_scale
from foreshock.attaching.model_facts import model_facts
from foreshock.attaching.options import Options
from foreshock.attaching.own_pass import run_again
from foreshock.attaching.sight import Sight
from foreshock.attaching.writer import TraceWriter
from foreshock.models.anatomies.watched_rows import smooth_objective
from foreshock.models.anatomy import Anatomy
from foreshock.models.objective import objective_at
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer
from foreshock.monitors.base import Monitor, Reading, StepView
from foreshock.monitors.unreadable import Unreadable
from foreshock.monitors.watch import Watch

MOST_SAID = 200
"""Characters of an error that are said; ``tracebacks`` has it whole."""


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
        self.declined, self.tracebacks = dict(declined), {}
        self.readings: dict[str, Reading] = {}
        self.seen: dict[str, int] = {}
        self._monitors, self._options, self._listeners = dict(monitors), options, list(options.listeners)
        self._watch = Watch(anatomy, optimizer, monitors)
        self._optimizer = optimizer
        self._closers: list[Callable[[], Any]] = []
        self._closed = False
        name = _named(anatomy) if options.out is None else Path(options.out).name
        self._live = Live(options, monitors, name, model_facts(anatomy))
        self._writer = None if options.out is None else TraceWriter(options.out, anatomy, monitors, nodes)
        self._watch.record(0)
        self._sight = Sight(anatomy, optimizer, self._wanted, options.rows, options.scaler, self._failed)

    stopped: str | None
    tracebacks: dict[str, str]

    @property
    def monitors(self) -> tuple[str, ...]:
        return tuple(self._monitors)

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
        return self._monitors[name]

    def summary(self) -> str:
        """How many monitors read, and a line for each that does not."""
        width = max((len(name) for name in self.declined), default=0)
        lines = [f"  {name:<{width}}  {reason}" for name, reason in self.declined.items()]
        declines = f", {len(lines)} decline:" if lines else ""
        return "\n".join([f"foreshock: {len(self._monitors)} monitors watch {_named(self.anatomy)}{declines}", *lines])

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
            if self._writer is not None and self.stopped is None:
                writer = self._writer
                self._kept(lambda: writer.close(self.steps, self._sight.tokens, self._ended))
            self._live.close(self.steps)

    def when_closed(self, call: Callable[[], Any]) -> None:
        self._closers.append(call)

    def __enter__(self) -> AttachedWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: Any) -> None:
        if kind is not None:
            self._ended = "failed" if issubclass(kind, Exception) else "interrupted"
        self.close()

    def _due(self) -> list[str]:
        now = self.steps + (0 if self._reading else 1)
        return [name for name in self._watch.due(now) if name in self._monitors]

    _reading = False
    _ended = "completed"

    def _wanted(self) -> tuple[frozenset[str], bool]:
        """What the next step's monitors tap, and whether one asks for routings."""
        due = [] if self.stopped is not None else self._due()
        return self._watch.places(due), self._routed(due)

    def _routed(self, due: list[str]) -> bool:
        return self.anatomy.moe is not None and any("routings" in self._monitors[name].needs.view for name in due)

    def _read(self, loss: Tensor) -> dict[str, Reading]:
        assert self._sight.grad_norm is not None
        if skips(self._options.scaler, loss, self._sight.grad_norm):
            self._watch.record(self.steps)
            self._live.read(self.steps, {}, self._sight.watched)  # where a storm of them is told
            return {}
        self._reading = True
        try:
            due = self._readable(self._due())
            view = self._view(loss, due)
            due = self._reached(due, view)
            self._watch.record(self.steps)
            readings: dict[str, Reading] = {}
            self._sight.apart = True  # a monitor may call the model
            for name in due:
                readings |= self._observe(name, view)
        finally:
            self._reading = self._sight.apart = False
        if readings:
            self.readings = readings
            self.seen |= dict.fromkeys(readings, self.steps)
            self._pass_on(readings, is_proven(view.taps))
        return readings

    def _readable(self, due: list[str]) -> list[str]:
        """Without those that read the optimizer where it has not stepped, or has lost the gradients that it took."""
        takers = [name for name in due if "optimizer" in self._monitors[name].needs.view]
        lost = self._sight.gradients_are_lost()
        for name in takers if lost else []:
            self._decline(name, "gradients are gone: call watch.step(loss) before optimizer.zero_grad()")
        return [name for name in due if name not in takers or (self._sight.updated and not lost)]

    def _view(self, loss: Tensor, due: list[str]) -> StepView:
        sight, places, routed = self._sight, self._watch.places(due), self._routed(due)
        taps, routings, rows = sight.taps, sight.routings, sight.watched
        missing = not places <= taps.places or bool(_untouched(taps, places))
        if rows is not None and (missing or (routed and not routings)):
            taps, routings = run_again(sight, rows, places, routed)
        model = self.anatomy.model
        objective = None
        if rows is not None and isinstance(model, Transformer):
            objective = partial(objective_at, model, rows.arguments[0], 1.0)
        elif rows is not None:
            objective = _readable(smooth_objective(model, rows))
        assert sight.grad_norm is not None
        return StepView(
            step=self.steps,
            tokens=sight.tokens,
            loss=loss,
            grad_norm=sight.grad_norm,
            anatomy=self.anatomy,
            routings=routings,
            taps=taps,
            objective_at=objective,
            batch=None if rows is None else rows.tokens,
            loss_scale=loss_scale(self.anatomy, taps) if "linear" in places else None,
        )

    def _reached(self, due: list[str], view: StepView) -> list[str]:
        """Without those that tap what no gradient reaches, what is called twice, or what a hook could not look at."""
        for name in due:
            places = self._monitors[name].needs.taps
            taps = {module: tap for place in places for module, tap in view.taps.at(place).items()}
            failed = next(((module, tap.failure) for module, tap in taps.items() if tap.failure is not None), None)
            if failed is not None:
                self._lose(name, failed[1], f"it cannot look at {failed[0]}: ")
            elif self._routed([name]) and not view.routings:
                failure = self._sight.router_failure or RuntimeError("one of them has not run")
                self._lose(name, failure, "it cannot look at the routers: ")
        due = [name for name in due if name in self._monitors and not self._called_again(name, view)]
        untouched = _untouched(view.taps, self._watch.places(due))
        for name in due:
            module = next((untouched[place] for place in self._monitors[name].needs.taps if place in untouched), None)
            if module is not None:
                self._decline(name, f"no gradient reaches {module}: it is not used, or all before it is frozen")
        return [name for name in due if name in self._monitors]

    def _called_again(self, name: str, view: StepView) -> bool:
        """Whether a weight's gradient is of more calls than were tapped, which a monitor leaves such a step out for."""
        places = [place for place in self._monitors[name].needs.taps if place != "dot_product"]  # says so of itself
        again = (module for place in places for module, tap in view.taps.at(place).items() if tap.arrivals > 1)
        module = next(again, None)
        if module is not None:
            self._decline(name, f"{module} is called more than once in a backward", off=False)
        elif "linear" in places and self._sight.shared and view.taps is self._sight.taps:
            self._decline(name, "a backward goes through more than one forward of the model", off=False)
        else:
            return False
        return True

    def _observe(self, name: str, view: StepView) -> dict[str, Reading]:
        """What one monitor reads; one that raises is switched off, and its traceback kept."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                readings = self._watch.observe(view, [name])
            self._note_unpredicted(name, view, readings)
            if caught:
                self._decline(name, f"in part: {'; '.join(sorted({str(each.message) for each in caught}))}", off=False)
            return readings
        except Unreadable as reason:
            self._decline(name, str(reason), off=False)
        except Exception as error:
            self._lose(name, error, "it raised ")
        return {}

    def _lose(self, name: str, error: Exception, how: str) -> None:
        """Switch a monitor off for what was raised in it, and keep the traceback."""
        self.tracebacks[name] = "".join(traceback.format_exception(error))
        said = f"switched off, {how}{_said(error)}"
        self._decline(name, f"{said} (watch.tracebacks[{name!r}])")
        self._live.own(self.steps, "monitor_failed" if self._monitors else "monitoring_blackout", f"{name} is {said}")

    def _note_unpredicted(self, name: str, view: StepView, readings: Mapping[str, Reading]) -> None:
        """Say once that a kernel's laws have no prediction beside them."""
        ratios = [signal.name for signal in self._monitors[name].signals if signal.universal]
        if not ratios or not readings or any(ratio in readings for ratio in ratios):
            return
        call = next((tap.call for tap in view.taps.at("dot_product").values() if tap.call is not None), None)
        if call is not None:
            of = "" if call.dtype is None else f" of {str(call.dtype).removeprefix('torch.')}"
            reason = f"the rounding of a {call.kernel} kernel{of} is not known"
            self._decline(f"{name}.over_noise", reason, off=False)

    def _decline(self, name: str, reason: str, off: bool = True) -> None:
        if off:
            self._monitors.pop(name, None)
        if self.declined.get(name) != reason:
            self.declined[name] = reason
            self._say(f"step {self.steps}: {name} declines: {reason}")

    def _pass_on(self, readings: Mapping[str, Reading], proven: bool) -> None:
        if self._writer is not None:
            self._kept(lambda: self._writer.add(self.steps, self._sight.tokens, readings))  # type: ignore[union-attr]
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
                reason = f"on_readings: {name} is switched off, it raised {_said(error)}"
                self._say(f"step {self.steps}: {reason}")
                self._live.own(self.steps, "listener_failed", reason)

    def _kept(self, write: Callable[[], Any]) -> None:
        """Write to the disk; where that fails, training goes on and the watch stops itself."""
        try:
            write()
        except OSError as error:
            self._stop("out_folder", f"its folder cannot be written: {error}")
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.tracebacks["watch"] = "".join(traceback.format_exception(error))
        self._stop("monitoring_blackout", f"{_said(error)} (watch.tracebacks['watch'])")

    def _stop(self, kind: str, reason: str) -> None:
        self.stopped = reason
        self._say(f"step {self.steps}: the watch has stopped, training goes on: {reason}")
        if hasattr(self, "_sight"):
            self._sight.close()
        self._live.own(self.steps, kind, reason)

    def _say(self, line: str) -> None:
        if not self._options.quiet:
            say(line, sys.stderr)


def _untouched(taps: Taps, places: frozenset[str]) -> dict[str, str]:
    """By tapped place, a module that a forward or a backward has not gone through; attention says so of itself."""
    found = {
        place: [name for name, tap in taps.at(place).items() if tap.output is None or tap.output_grad is None]
        for place in places & taps.places - {"dot_product"}
    }
    return {place: names[0] for place, names in found.items() if names}


def _readable(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The objective, but where the model returns none its monitors leave the step out."""

    def at(weights: Mapping[str, Tensor]) -> Tensor:
        try:
            return objective(weights)
        except ValueError as error:
            raise Unreadable(str(error)) from error

    return at


def _said(error: BaseException) -> str:
    """An error in one line of at most ``MOST_SAID`` characters."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    return line if len(line) <= MOST_SAID else f"{line[: MOST_SAID - 3]}..."


def _named(anatomy: Anatomy) -> str:
    return type(anatomy.model).__name__
