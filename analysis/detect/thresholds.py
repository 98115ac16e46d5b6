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
    """One signal's. limit: its chart alarms strictly above; alone: what the limit would be without other signals;
    every_steps, bad, jittered: of the calibrated signal, None for jittered where an older file does not say; shape:
    layers and heads of its readings, None there too.

    Of the reference track, positions (T,), steps, and centre and scale (T, layers); of the floor, expected.
    """

    limit: float
    alone: float | None = None
    every_steps: int = Field(ge=1)
    bad: Literal["up", "down", "both"]
    jittered: bool | None = None
    shape: tuple[int, int] | None = None
    positions: tuple[int, ...] = ()
    centre: tuple[tuple[float, ...], ...] = ()
    scale: tuple[tuple[float, ...], ...] = ()
    expected: float = 0.0

    def unlike(self, signal: Signal, shape: tuple[int, ...]) -> str | None:
        """How a signal whose readings have a shape (layers, heads) differs from the calibrated one, or None."""
        differ = {field: (getattr(signal, field), getattr(self, field)) for field in ("every_steps", "bad", "jittered")}
        if self.shape is not None:
            differ["layers and heads"] = (shape, self.shape)
        for field, (here, there) in differ.items():
            if there is not None and here != there:
                return f"{signal.name}: {field} is {here}, and was {there} in the runs that set its threshold"
        return None


class Thresholds(Strict):
    """runs: ids of the runs that set the thresholds, reference_runs: of those that set bands and scales.

    alpha: the probability that a healthy run of ``horizon_steps`` alarms at all (``joint``), or on a given signal;
    horizon_run: the shortest run, whose end that is; track, chart: what is charted, and how (a node of ``conf/rule``);
    declined: by signal, why it has no threshold; model: of the runs, as an attached manifest has it, None for others.
    """

    schema_version: Literal[1] = 1
    runs: tuple[str, ...]
    reference_runs: tuple[str, ...] = ()
    alpha: float = Field(gt=0, lt=1)
    horizon_steps: int = Field(ge=1)
    horizon_run: str = ""
    track: Literal["reference", "self", "floor"]
    chart: dict[str, Any]
    joint: bool
    model: Mapping[str, Any] | None = None
    signals: Mapping[str, SignalThreshold]
    declined: Mapping[str, str] = Field(default_factory=dict)

    @property
    def per_million_steps(self) -> float:
        """False alarms of healthy training, at most, over all signals together."""
        return 1e6 * self.alpha / self.horizon_steps * (1 if self.joint else len(self.signals))

    @property
    def widest(self) -> tuple[str, float] | None:
        """The signal whose limit the others raise most, and how many times; None where no limit is positive."""
        ratios = {n: s.limit / s.alone for n, s in self.signals.items() if s.alone is not None and s.alone > 0}
        return max(ratios.items(), key=lambda item: item[1], default=None)

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

    @classmethod
    def of_model(cls, path: Path, model: Mapping[str, Any] | None) -> Thresholds:
        """``read``, for a model as an attached manifest has it. Raises ValueError too where the file is of another.

        The number of parameters and of blocks tells them apart; a class may be wrapped.
        """
        made = cls.read(path)
        for field in ("parameters", "blocks") if model is not None and made.model is not None else ():
            here, there = model.get(field), made.model.get(field)  # type: ignore[union-attr]
            if here != there:
                raise ValueError(f"alarms={str(path)!r} is of another model: {field} is {here}, and was {there} there")
        return made

    def write(self, path: Path) -> None:
        write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())
