"""Thresholds from one's own healthy runs, out of a file that may change while training goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.alarms.online_charts import OnlineChart, chart_of
from foreshock.alarms.reading import HostReading
from foreshock.alarms.rules import SIGNS, Breach, OwnPast
from foreshock.analysis.detect.calibration import FLOOR, SELF
from foreshock.analysis.detect.thresholds import Thresholds
from foreshock.monitors.signal import Signal


class Calibrated:
    """``calibrated``: the chart of a signal above the threshold that ``foreshock calibrate`` set on healthy runs.

    declined: by signal of the file, why this run's readings are not those that it was calibrated on. The rate is
    alpha over the horizon of the calibration runs, for all signals together; beyond that horizon a band by step ends,
    and the promise with it.
    """

    name = "calibrated"

    def __init__(self, path: str | Path, model: Mapping[str, Any] | None = None) -> None:
        """model: that is watched, as a manifest's ``attached`` has it, None for any.

        Raises ValueError, in one line, where the file is missing, is none of thresholds, or is of another model.
        """
        self._path, self._model = Path(path), model
        self._seen = _mark(self._path)
        self.thresholds = Thresholds.of_model(self._path, model)
        self.declined: dict[str, str] = {}
        self._forget()

    def _forget(self) -> None:
        self._own = OwnPast()
        self._charts: dict[str, list[OnlineChart]] = {}
        self._statistics: dict[str, list[float]] = {}

    def reload(self) -> bool:
        """Read the file again where it has changed. Charts go on where only thresholds are new.

        Raises ValueError for a changed file that is none of thresholds or of another model: the old ones stay.
        """
        mark = _mark(self._path)
        if mark == self._seen:
            return False
        self._seen = mark
        new = Thresholds.of_model(self._path, self._model)
        if (new.track, new.chart) != (self.thresholds.track, self.thresholds.chart):
            self._forget()
        self.thresholds, self.declined = new, {}
        return True

    @property
    def known(self) -> frozenset[str]:
        """The signals that it judges."""
        return frozenset(self.thresholds.signals.keys() - self.declined.keys())

    def applies(self, signal: Signal) -> bool:
        return True  # a signal may enter with a file that changes

    def judge(self, readings: Sequence[HostReading]) -> dict[str, Breach]:
        known = [reading for reading in readings if self._is_known(reading)]
        scores = self._own.z(known) if self.thresholds.track == SELF else {r.signal.name: self._z(r) for r in known}
        judged = ((name, self._breach(name, z)) for name, z in scores.items() if z is not None)
        return {name: breach for name, breach in judged if breach is not None}

    def _is_known(self, reading: HostReading) -> bool:
        signal = reading.signal
        known = self.thresholds.signals.get(signal.name)
        if known is None or signal.name in self.declined:
            return False
        reason = known.unlike(signal, reading.value.shape)
        if reason is not None:
            self.declined[signal.name] = reason
        return reason is None

    def _breach(self, name: str, z: np.ndarray) -> Breach | None:
        """Of the signal's charts, one for each side, after z-scores (layers, heads); missing ones leave them be."""
        known = self.thresholds.signals[name]
        signs = SIGNS[known.bad]
        charts = self._charts.setdefault(name, [chart_of(self.thresholds.chart) for _ in signs])
        statistics = self._statistics.setdefault(name, [-np.inf] * len(signs))
        if not np.isnan(z).all():
            for side, (sign, chart) in enumerate(zip(signs, charts, strict=True)):
                statistics[side] = chart.update(float(np.nanmax(sign * z)))
        side = int(np.argmax(statistics))
        if not statistics[side] > known.limit:
            return None
        worst = np.where(np.isnan(z), -np.inf, signs[side] * z)
        return Breach(int(worst.argmax()), statistics[side], known.limit, "above" if signs[side] > 0 else "below")

    def _z(self, reading: HostReading) -> np.ndarray | None:
        """(layers, heads) on a track of bands, or None where it has none at this step."""
        known = self.thresholds.signals[reading.signal.name]
        if self.thresholds.track == FLOOR:
            return reading.finite - known.expected
        at = int(np.searchsorted(known.positions, reading.step))
        if at == len(known.positions) or known.positions[at] != reading.step:
            return None
        centre, scale = (np.asarray(part[at])[:, None] for part in (known.centre, known.scale))
        scores: np.ndarray = (reading.finite - centre) / scale
        return scores

    def per_million_steps(self, step: int) -> float:
        return self.thresholds.per_million_steps


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
