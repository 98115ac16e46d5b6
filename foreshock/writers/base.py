"""Where readings and alarms go beside the trace: one small interface."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from foreshock.alarms.event import Event
from foreshock.alarms.reading import HostReading


class Writer(Protocol):
    """What ``foreshock.attach(writers=[...])`` takes. One that raises is switched off, and training goes on.

    ``attach`` opens a writer before training, in the first process alone: the others do not call it.
    """

    def open(self) -> None:
        """Begin its file or run; called once. What it raises, ``attach`` raises."""
        ...

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """The readings of a step (``scalars``)."""
        ...

    def alarm(self, event: Event) -> None: ...

    def close(self) -> None:
        """Write what is left; called once."""
        ...


def scalars(readings: Iterable[HostReading]) -> dict[str, float]:
    """By name, a signal without axes; ``<signal>/min``, ``/mean`` and ``/max`` over layers and heads of any other.

    Missing samples are left out, and so is a signal that has no other. A value that is not finite is kept as it is,
    and makes the three of its signal so.
    """
    values: dict[str, float] = {}
    for reading in readings:
        x = np.where(reading.undefined, np.nan, reading.value)
        there = ~reading.undefined
        if not there.any():
            continue
        if not reading.signal.axes:
            values[reading.signal.name] = float(x[0, 0])
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # Inf - Inf in a mean
            for name, reduce in (("min", np.min), ("mean", np.mean), ("max", np.max)):
                values[f"{reading.signal.name}/{name}"] = float(reduce(x[there]))
    return values


def missing(package: str, extra: str) -> ImportError:
    """The error for a writer whose package is not installed."""
    return ImportError(f"this writer needs {package}: pip install 'foreshock[{extra}]'")
