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

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
SWEEP_FOLDER = "FORESHOCK_SWEEP_FOLDER"
"""Environment variable: the folder by which the processes of a sweep hear of each other."""

STOP = "stop"
"""A file in that folder: save and leave."""

WATCH_S = 0.5

_received: list[int] = []
_holding = 0
_leading = False


class Stopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[dict[int, object]]:
    """Handle the signals within; yields the handlers from before. None in a thread, or for a signal that is ignored."""
    previous = {}
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
def stoppable() -> Iterator[None]:
    """A signal raises Stopped within."""

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    with _handling(stop):
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
        if _leading:
            (_own_folder() / STOP).touch()

    _holding += 1
    try:
        with _handling(keep) as previous:
            yield
    finally:
        _holding -= 1
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
        os._exit(1)


@functools.cache
def end_with_parent() -> None:
    """From now on, a worker ends soon after its parent, once it has left ``held``, and by no signal between jobs."""
    if not is_worker():
        return
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while _holding or not orphaned():
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
