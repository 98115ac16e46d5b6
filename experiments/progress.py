"""Live progress of one run, and of many runs seen from their folders."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from experiments.live import LiveAlarms
from monitors.base import Reading, Signal

REFRESH_S = 0.5
ALARMS_SHARE = 0.01
"""Of the time that live alarms may take: hundreds of signals are tens of milliseconds, in which a GPU has to wait."""

STATUS = "status.json"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        refresh_per_second=4,
    )


class RunProgress:
    """A bar with loss, step rate and live alarms; also the run's ``status.json``, from which a sweep is watched.

    Values are read from the device only when the bar is redrawn.
    """

    def __init__(self, folder: Path, steps: int, signals: Iterable[Signal], show: bool) -> None:
        self._live = LiveAlarms(signals) if show else None
        self._folder = folder
        self._bar = _bar() if show else None
        self._task = self._bar.add_task(folder.name, total=steps, info="") if self._bar else None
        self._last: tuple[float, int] | None = None
        self._alarms: dict[str, float] = {}
        self._alarms_again = 0.0

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._last is not None:  # else it may be that of another process, which has the run
            (self._folder / STATUS).unlink(missing_ok=True)

    def __call__(self, step: int, loss: Tensor, readings: Mapping[str, Reading]) -> None:
        if self._live:
            self._live.add(readings)
        now = time.monotonic()
        if self._last is None:
            self._last = (now, step)
        elapsed = now - self._last[0]
        if elapsed < REFRESH_S:
            return
        rate = (step - self._last[1]) / elapsed
        self._last = (now, step)
        value = loss.item()
        if self._bar:
            alarms = self._raised(now)
            more = f" and {len(alarms) - 1} more" if len(alarms) > 1 else ""
            said = f"  [red]{next(iter(alarms))}{more}[/red]" if alarms else ""
            self._bar.update(self._task, completed=step, info=f"loss {value:.3f} nats  {rate:.0f} steps/s{said}")
        _write_status(self._folder, step, value, rate)

    def _raised(self, now: float) -> dict[str, float]:
        """The alarms, asked for anew when what the last answer took has become a small share of the time."""
        if now >= self._alarms_again:
            started = time.monotonic()
            self._alarms = self._live.raised()
            self._alarms_again = now + (time.monotonic() - started) / ALARMS_SHARE
        return self._alarms


class StackProgress:
    """The ``status.json`` of every run of a stack, from which a sweep is watched; one read from the device for all."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._shown: set[Path] = set()

    def __enter__(self) -> StackProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear(self._shown)

    def __call__(self, step: int, losses: Mapping[Path, Tensor]) -> None:
        """losses: by run folder, of the runs that still record."""
        now = time.monotonic()
        if self._last is None or step < self._last[1]:  # the next stack of this process starts again
            self._last = (now, step)
        elapsed = now - self._last[0]
        if elapsed < REFRESH_S:
            return
        rate = (step - self._last[1]) / elapsed
        self._last = (now, step)
        self._clear(self._shown - set(losses))
        for folder, loss in zip(losses, torch.stack(list(losses.values())).tolist(), strict=True):
            _write_status(folder, step, loss, rate)
        self._shown = set(losses)

    @staticmethod
    def _clear(folders: Iterable[Path]) -> None:
        for folder in folders:
            (folder / STATUS).unlink(missing_ok=True)


class SweepProgress:
    """One bar for a sweep: watches the runs' folders from a thread while a launcher works."""

    def __init__(self, steps_of: Mapping[Path, int]) -> None:
        self._steps_of = steps_of
        self._bar = _bar()
        self._task = self._bar.add_task("runs", total=sum(steps_of.values()), info="")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def _watch(self) -> None:
        while not self._stop.wait(REFRESH_S):
            self.refresh()

    def refresh(self) -> None:
        done_steps, done_runs, losses, rate = 0, 0, [], 0.0
        for folder, steps in self._steps_of.items():
            status = _json(folder / STATUS)
            if status is not None:
                done_steps += status["step"]
                rate += status["steps_per_s"]
                losses.append(f"{status['loss']:.2f}")
            elif (folder / "weights.safetensors").exists():
                done_steps, done_runs = done_steps + steps, done_runs + 1
        info = f"{done_runs}/{len(self._steps_of)} runs  loss {' '.join(losses)}  {rate:.0f} steps/s"
        self._bar.update(self._task, completed=done_steps, info=info)


def _write_status(folder: Path, step: int, loss: float, steps_per_s: float) -> None:
    with suppress(OSError):  # a status line is not worth a run
        (folder / STATUS).write_text(json.dumps({"step": step, "loss": loss, "steps_per_s": steps_per_s}))


def _json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
