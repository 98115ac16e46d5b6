"""Signals while a command that trains is starting: one line and the exit code at once, since nothing is written yet.

Imports take seconds, in which Python's own handlers print a traceback for SIGINT and nothing at all for SIGTERM. An
exception is no answer there: a compiled module that is half imported may swallow it. Once a command runs,
``experiments.training.stopping`` takes signals over. Needs only the standard library.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from foreshock.names import short

TRAINING = ("canary", "campaign", "compare", "reproduce", "train")
"""The modules of ``experiments`` that train, each by a command of its name."""

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

GOES_ON = "the same command resumes from the last checkpoints"
"""What a stopped command says of itself; without any checkpoint it begins anew."""


def said_of(number: int) -> str:
    """The line of a command that a signal has ended."""
    if number == signal.SIGINT:
        return f"interrupted: {GOES_ON}"
    return f"stopped by {signal.Signals(number).name}: {GOES_ON}"


def end_at_once(number: int, _: object = None) -> None:
    """A handler: say so on standard error and end this process with 128 and the signal's number."""
    os.write(2, f"{said_of(number)}\n".encode())
    os._exit(128 + number)


def answer_signals() -> None:
    """From now on a signal ends this process with its line; one that is ignored, as under nohup, stays so."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_at_once)


def is_training_command(original: Sequence[str]) -> bool:
    """Whether a process was started as ``python -m`` with a command that trains. original: ``sys.orig_argv``."""
    if "-m" not in original[:-1]:
        return False
    module, *rest = original[original.index("-m") + 1 :]
    if module == "foreshock":
        return rest[:1] != [] and rest[0] in TRAINING
    return short(module) in {f"experiments.{name}" for name in TRAINING}


def begin() -> None:
    """Answer signals where ``python -m`` is just finding the module of a command that trains, and nowhere else.

    Python's first argument is ``-m`` for as long as it imports the packages around that module.
    """
    if sys.argv[:1] == ["-m"] and is_training_command(sys.orig_argv):
        answer_signals()
