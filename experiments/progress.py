"""Live progress of one run, and of many runs seen from their folders."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from foreshock.experiments.live import LiveAlarms
from foreshock.monitors.base import Reading, Signal

REFRESH_S = 0.5
ALARMS_SHARE = 0.01
"""Of the time that live alarms may take: hundreds of signals are tens of milliseconds, in which a GPU has to wait."""

STATUS = "status.json"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[info]}"),
        TextColumn("[red]{task.fields[alarms]}[/red]"),
        refresh_per_second=4,
    )


class Pace:
    """The time that is left at the mean pace since the first step that was seen: steady, as no step is forgotten."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def left_s(self, now: float, trained_steps: int, left_steps: float) -> float | None:
        """Seconds; None before there is a pace. trained_steps: so far, by this command or before it."""
        if self._first is None or trained_steps < self._first[1]:
            self._first = (now, trained_steps)
        since, trained = now - self._first[0], trained_steps - self._first[1]
        return left_steps * since / trained if trained else None


def said_time(seconds: float | None) -> str:
    """``40 s left``, ``7 min left``, ``2 h 10 min left``; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s left"
    minutes = round(seconds / 60)
    return f"{minutes} min left" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min left"


def said_alarms(alarms: Iterable[str]) -> str:
    """The first by name, the others counted."""
    first, *others = [*alarms, ""]
    return f"{first} and {len(others) - 1} more" if len(others) > 1 else first


class _Ask:
    """Live alarms, asked for anew when what the last answer took has become a small share of the time."""

    def __init__(self, live: LiveAlarms) -> None:
        self.live = live
        self._answer: dict[int, dict[str, float]] = {}
        self._again = 0.0

    def raised(self, now: float) -> dict[int, dict[str, float]]:
        if now >= self._again:
            started = time.monotonic()
            self._answer = self.live.raised_by_run()
            self._again = now + (time.monotonic() - started) / ALARMS_SHARE
        return self._answer


class RunProgress:
    """A bar with loss, step rate and live alarms; also the run's ``status.json``, from which a sweep is watched.

    Values are read from the device only when the bar is redrawn.
    """

    def __init__(self, folder: Path, steps: int, signals: Iterable[Signal], show: bool) -> None:
        self._ask = _Ask(LiveAlarms(signals))
        self._folder, self._steps = folder, steps
        self._bar = _bar() if show else None
        self._task = self._bar.add_task(folder.name, total=steps, info="", left="", alarms="") if self._bar else None
        self._pace = Pace()
        self._last: tuple[float, int] | None = None
        self._step = 0

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._step, left="")
            self._bar.stop()
        if self._last is not None:  # else it may be that of another process, which has the run
            (self._folder / STATUS).unlink(missing_ok=True)

    def __call__(self, step: int, loss: Tensor, readings: Mapping[str, Reading], rows: Mapping[Path, int]) -> None:
        self._ask.live.add(readings)
        self._step, now = step, time.monotonic()
        left_s = self._pace.left_s(now, step, self._steps - step)
        if self._last is None or step < self._last[1]:  # a run may go back to an earlier checkpoint
            self._last = (now, step)
        elapsed = now - self._last[0]
        if elapsed < REFRESH_S:
            return
        rate = (step - self._last[1]) / elapsed
        self._last = (now, step)
        value, alarms = loss.item(), list(self._ask.raised(now).get(0, {}))
        if self._bar and self._task is not None:
            info = f"loss {value:.3f} nats  {rate:.0f} steps/s"
            left, said = said_time(left_s), said_alarms(alarms)
            self._bar.update(self._task, completed=step, info=info, left=left, alarms=said)
        _write_status(self._folder, step, value, rate, alarms)


class StackProgress:
    """The ``status.json`` of every run of a stack, from which a sweep is watched; one read from the device for all."""

    def __init__(self, signals: Iterable[Signal]) -> None:
        self._signals = list(signals)
        self._ask = _Ask(LiveAlarms(self._signals, stacked=True))
        self._last: tuple[float, int] | None = None
        self._seen: set[Path] = set()
        self._shown: set[Path] = set()

    def __enter__(self) -> StackProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear(self._shown)

    def __call__(self, step: int, losses: Tensor, readings: Mapping[str, Reading], rows: Mapping[Path, int]) -> None:
        """rows: by run folder, the place in the stack of the runs that still record; losses (N,), readings (N, ...)."""
        now = time.monotonic()
        if self._last is None or not self._seen.issuperset(rows):  # the next stack of this process starts
            self._last, self._ask = (now, step), _Ask(LiveAlarms(self._signals, stacked=True))
        self._seen = set(rows)
        self._ask.live.add(readings)
        elapsed = now - self._last[0]
        if elapsed < REFRESH_S:
            return
        rate = (step - self._last[1]) / elapsed
        self._last = (now, step)
        self._clear(self._shown - set(rows))
        values, raised = losses.tolist(), self._ask.raised(now)
        for folder, row in rows.items():
            _write_status(folder, step, values[row], rate, list(raised.get(row, {})))
        self._shown = set(rows)

    @staticmethod
    def _clear(folders: Iterable[Path]) -> None:
        for folder in folders:
            (folder / STATUS).unlink(missing_ok=True)


@dataclass(frozen=True)
class RunInSweep:
    """name: for people; steps: of the whole run."""

    name: str
    steps: int


class SweepProgress:
    """One bar for a sweep: watches the runs' folders from a thread while a launcher works.

    at_once: how many runs train at a time. Where fewer are left, the longest of them says how long it takes.
    """

    def __init__(self, runs: Mapping[Path, RunInSweep], at_once: int) -> None:
        self._runs, self._at_once = runs, at_once
        self._before = {folder: _steps_done(folder) for folder in runs}  # by earlier commands
        self._ended: dict[Path, int] = {}
        self._pace = Pace()
        self._bar = _bar()
        total = sum(run.steps for run in runs.values())
        self._task = self._bar.add_task("steps", total=total, info="", left="", alarms="")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.refresh()
        self._bar.stop()

    def _watch(self) -> None:
        while not self._stop.wait(REFRESH_S):
            self.refresh()

    def refresh(self) -> None:
        """Read where every run stands. A run that ended early has no steps left."""
        trained, left, losses, rate, alarms = 0, [], [], 0.0, []
        for folder, run in self._runs.items():
            status = None if folder in self._ended else _json(folder / STATUS)
            if status is None and folder not in self._ended and (folder / "weights.safetensors").exists():
                self._ended[folder] = _steps_done(folder)
            if folder in self._ended:
                trained += self._ended[folder]
                continue
            step = self._before[folder] if status is None else status["step"]
            trained += step
            left.append(run.steps - step)
            if status is not None:
                rate += status["steps_per_s"]
                losses.append(f"{status['loss']:.2f}")
                alarms += [f"{run.name}: {said_alarms(status['alarms'])}"] if status["alarms"] else []
        work = max(sum(left), self._at_once * max(left, default=0))
        left_s = self._pace.left_s(time.monotonic(), trained, work)
        shown = f"  loss {' '.join(losses)}  {rate:.0f} steps/s" if losses else ""
        self._bar.update(
            self._task,
            completed=sum(run.steps for run in self._runs.values()) - sum(left),
            left=said_time(left_s) if left else "",
            info=f"{len(self._ended)}/{len(self._runs)} runs{shown}",
            alarms=", ".join(alarms),
        )


def _write_status(folder: Path, step: int, loss: float, steps_per_s: float, alarms: list[str]) -> None:
    said = {"step": step, "loss": loss, "steps_per_s": steps_per_s, "alarms": alarms}
    with suppress(OSError):  # a status line is not worth a run
        (folder / STATUS).write_text(json.dumps(said))


def _steps_done(folder: Path) -> int:
    return (_json(folder / "manifest.json") or {}).get("steps_done", 0)


def _json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
