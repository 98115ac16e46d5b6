"""A file of thresholds that healthy runs have set: what ``calibrate`` writes and a live watch reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foreshock.experiments.files import write_whole
from foreshock.monitors.signal import Signal


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SignalThreshold(Strict):
    """One signal's. limit: its chart alarms strictly above; every_steps, bad, jittered: of the calibrated signal, None
    for jittered where an older file does not say.

    Of the reference track, positions (T,), steps, and centre and scale (T, layers); of the floor, expected.
    """

    limit: float
    every_steps: int = Field(ge=1)
    bad: Literal["up", "down", "both"]
    jittered: bool | None = None
    positions: tuple[int, ...] = ()
    centre: tuple[tuple[float, ...], ...] = ()
    scale: tuple[tuple[float, ...], ...] = ()
    expected: float = 0.0

    def unlike(self, signal: Signal) -> str | None:
        """How a signal differs from the calibrated one, or None."""
        for field in ("every_steps", "bad", "jittered"):
            here, there = getattr(signal, field), getattr(self, field)
            if there is not None and here != there:
                return f"{signal.name}: {field} is {here}, and was {there} in the runs that set its threshold"
        return None


class Thresholds(Strict):
    """runs: ids of the runs that set the thresholds, reference_runs: of those that set bands and scales.

    alpha: the probability that a healthy run of ``horizon_steps`` alarms at all (``joint``), or on a given signal;
    track, chart: what is charted, and how (a node of ``conf/rule``); declined: by signal, why it has no threshold.
    """

    schema_version: Literal[1] = 1
    runs: tuple[str, ...]
    reference_runs: tuple[str, ...] = ()
    alpha: float = Field(gt=0, lt=1)
    horizon_steps: int = Field(ge=1)
    track: Literal["reference", "self", "floor"]
    chart: dict[str, Any]
    joint: bool
    signals: Mapping[str, SignalThreshold]
    declined: Mapping[str, str] = Field(default_factory=dict)

    @property
    def per_million_steps(self) -> float:
        """False alarms of healthy training, at most, over all signals together."""
        return 1e6 * self.alpha / self.horizon_steps * (1 if self.joint else len(self.signals))

    @classmethod
    def read(cls, path: Path) -> Thresholds:
        """Raises ValueError, in one line that names the file, where it is missing or no file of thresholds."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ValueError(f"alarms={str(path)!r} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            said = f"{where}: {first['msg']}" if where else first["msg"]
            raise ValueError(f"alarms={str(path)!r} is no file of foreshock calibrate: {said}") from None

    def write(self, path: Path) -> None:
        write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())
