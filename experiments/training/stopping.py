"""Ends that others ask for: SIGTERM, SIGHUP, a sweep that stops, a parent that is gone. Training saves first.

    with held():                     # a signal waits here
        for step in range(steps):
            ...
            if asked():
                save a checkpoint and leave
    # and is delivered here: Stopped in a command, its usual effect elsewhere

A sweep's processes are asked by a file whose folder is in their environment, since joblib kills them where an
exception passes it.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from foreshock.starting import end_at_once

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
SWEEP_FOLDER = "FORESHOCK_SWEEP_FOLDER"
"""Environment variable: the folder by which the processes of a sweep hear of each other."""

STOP, BUSY, HERE = "stop", "busy-", "here-"
"""Files in that folder: save and leave; this process, whose number follows, is training; it has checked in."""

WATCH_S, CHECK_IN_S = 0.5, 20.0

Handler = Callable[[int, FrameType | None], Any] | int | None
"""What handles a signal: a function, or one of the numbers ``signal.SIG_DFL`` and ``signal.SIG_IGN``."""

_received: list[int] = []
_holding = 0
_leading = False


class Stopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number


@contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[dict[int, Handler]]:
    """Handle the signals within; yields the handlers from before. None in a thread, or for a signal that is ignored."""
    previous: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        previous = {number: old for number, old in previous.items() if old not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Python's own handler of SIGINT within, in place of that of a command that is starting."""
    starting = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is end_at_once
    if starting:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if starting:
            signal.signal(signal.SIGINT, end_at_once)


@contextmanager
def stoppable() -> Iterator[None]:
    """A signal raises Stopped within, and SIGINT KeyboardInterrupt."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    with _handling(stop), _interruptible():
        yield


@contextmanager
def held() -> Iterator[None]:
    """The first signal waits until the end of this block, where it is delivered; a second one is delivered at once."""
    global _holding

    def keep(number: int, _: object) -> None:
        if _received:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
            return
        _received.append(number)
        if _leading and not (_own_folder() / STOP).exists():
            (_own_folder() / STOP).touch()
            threading.Thread(target=_end_when_idle, args=(number,), daemon=True).start()

    led = None if _leading else sweep_folder()
    busy = led and led / f"{BUSY}{os.getpid()}"
    _holding += 1
    if busy:
        busy.touch()
    try:
        with _handling(keep) as previous:
            yield
    finally:
        _holding -= 1
        if busy:
            busy.unlink(missing_ok=True)
        if _received and previous:
            signal.raise_signal(_received.pop())


@contextmanager
def launching() -> Iterator[Path]:
    """Around a launcher: a signal is held, and the jobs' processes hear of it. Yields the folder that they share."""
    global _leading
    folder = sweep_folder()
    if folder is not None:  # a sweep within a sweep
        with held():
            yield folder
        return
    folder = _own_folder()
    os.environ[SWEEP_FOLDER], _leading = str(folder), True
    try:
        with held():
            yield folder
    finally:
        del os.environ[SWEEP_FOLDER]
        _leading = False
        (folder / STOP).unlink(missing_ok=True)


def _end_when_idle(number: int) -> None:
    """Deliver a held signal once nothing trains: else a launcher goes through all jobs that are left."""
    while _holding > 1 or any(_own_folder().glob(f"{BUSY}*")):
        time.sleep(WATCH_S)
    if _received:
        os.kill(os.getpid(), number)


@functools.cache
def _own_folder() -> Path:
    """One a process, as joblib keeps its workers, and their environment, from one launch to the next."""
    folder = Path(tempfile.mkdtemp(prefix="foreshock-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sweep_folder() -> Path | None:
    """The folder of the sweep that this process works for; None where there is none, or not on this machine."""
    folder = os.environ.get(SWEEP_FOLDER)
    return Path(folder) if folder is not None and os.path.isdir(folder) else None


def asked() -> bool:
    """Whether to save and leave."""
    folder = os.environ.get(SWEEP_FOLDER)
    return bool(_received) or orphaned() or (folder is not None and os.path.exists(f"{folder}/{STOP}"))


def is_worker() -> bool:
    """Whether another Python process started this one to work for it."""
    return multiprocessing.parent_process() is not None


def orphaned() -> bool:
    """Whether this is a worker whose parent is gone."""
    parent = multiprocessing.parent_process()
    return parent is not None and os.getppid() != parent.pid


def end_if_orphaned() -> None:
    """End this process where nobody waits for what it would hand back."""
    if orphaned():
        shutil.rmtree(os.environ.get(SWEEP_FOLDER, ""), ignore_errors=True)
        os._exit(1)


def check_in(folder: Path, workers: int) -> None:
    """A first job for each worker of a launcher: it ends with its parent from then on, and waits for the others here.

    A worker that has not yet been so far waits for ever for a job that its parent has half handed over when it dies.
    """
    end_with_parent()
    (folder / f"{HERE}{os.getpid()}").touch()
    until = time.monotonic() + CHECK_IN_S
    while len(list(folder.glob(f"{HERE}*"))) < workers and time.monotonic() < until and not asked():
        time.sleep(0.05)


@functools.cache
def end_with_parent() -> None:
    """From now on, a worker ends soon after its parent, once it has left ``held``, and by no signal between jobs."""
    if not is_worker():
        return
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while True:
            time.sleep(WATCH_S)
            if not _holding:
                end_if_orphaned()

    threading.Thread(target=watch, daemon=True).start()
