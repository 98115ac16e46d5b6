"""What lies between a run's monitors and its recorder: nothing, or a fault that loses readings or makes them late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from foreshock.faults.base import Sites
from foreshock.faults.log import InjectionLog
from foreshock.faults.operation import Moment
from foreshock.faults.telemetry_gap import Gap
from foreshock.monitors.base import Masked, Reading


class _Late(NamedTuple):
    """A reading on its way: the update at which it arrives, the one at which it was taken, and what it says."""

    arrives: int
    taken: int
    reading: Reading


class Telemetry:
    """The readings of one run on their way to the recorder.

    A reading that a newer one of its signal has overtaken is dropped.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._late: dict[str, list[_Late]] = {}

    def arrived(self, step: int, readings: dict[str, Reading], site: Sites, log: InjectionLog) -> dict[str, Reading]:
        """What is recorded of the readings of update ``step``: those given, older ones, or missing samples."""
        gap = next((operation for operation in site.system if isinstance(operation, Gap)), None)
        if gap is None or gap.idle:
            for name in readings if self._late else ():
                self._late.pop(name, None)
            return readings
        moment = Moment(self._seed, step, vocab_size=0)  # its draws are of no token
        newest: dict[str, _Late | None] = {}
        for name, reading in readings.items():
            if not gap.loses(name, moment):
                self._late.setdefault(name, []).append(_Late(step + gap.delay, step, reading))
            newest[name] = self._take(name, step)
        missing = [late is None for late in newest.values()]
        late_steps = [0 if late is None else step - late.taken for late in newest.values()]
        for what, counts in (("missing", missing), ("late_steps", late_steps)):
            after = torch.tensor(counts, dtype=torch.float64)
            log.add("system", gap, what, torch.zeros_like(after), after)
        return {name: _missing(readings[name]) if late is None else late.reading for name, late in newest.items()}

    def _take(self, name: str, step: int) -> _Late | None:
        """The newest reading of a signal that has arrived by now; those before it are gone."""
        late = self._late.get(name, [])
        here = [reading for reading in late if reading.arrives <= step]
        if not here:
            return None
        newest = max(here, key=lambda reading: reading.taken)
        self._late[name] = [reading for reading in late if reading.taken > newest.taken]
        return newest

    def state_dict(self) -> dict[str, list[tuple[Any, ...]]]:
        return {name: [(*late[:2], *_parts(late.reading)) for late in of_one] for name, of_one in self._late.items()}

    def load_state_dict(self, state: Mapping[str, list[tuple[Any, ...]]]) -> None:
        self._late = {
            name: [
                _Late(arrives, taken, value if undefined is None else Masked(value, undefined))
                for arrives, taken, value, undefined in of_one
            ]
            for name, of_one in state.items()
        }


def _parts(reading: Reading) -> tuple[Any, Any]:
    return (reading.value, reading.undefined) if isinstance(reading, Masked) else (reading, None)


def _missing(reading: Reading) -> Masked:
    """A missing sample of a reading's form, without its value."""
    value, _ = _parts(reading)
    nothing = torch.full_like(value, torch.nan) if value.is_floating_point() else torch.zeros_like(value)
    return Masked(nothing, torch.ones_like(value, dtype=torch.bool))
