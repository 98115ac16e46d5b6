"""Every detector's alarm in every run: signals held against a track, charted, and given a threshold on healthy runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from analysis.alarms import AlarmRule, conformal_threshold, first_alarm, oriented
from analysis.align import Aligned, hold, positions
from analysis.entrants import BadEntrant, check_causal
from analysis.tracks import DeclinedSignal, fit_band, published_rule
from experiments.trace import TraceError

if TYPE_CHECKING:
    from analysis.experiment import Experiment, ScoredRun

Chart = tuple[np.ndarray, np.ndarray]
"""Positions and statistic of one signal in one run, both (T,)."""


@dataclass(frozen=True)
class Detector:
    """Some signals that share one threshold: an alarm is raised when any of their charts is above it.

    alarms: by run id, positions on the experiment's axis; charts: by run id, one for each signal;
    maxima: the largest statistic of each calibration run; declined: why the track cannot judge it, or None.
    """

    name: str
    signals: tuple[str, ...]
    threshold: float = float("nan")
    alarms: Mapping[str, int | None] = field(default_factory=dict)
    declined: str | None = None
    charts: Mapping[str, Sequence[Chart]] = field(default_factory=dict, repr=False)
    maxima: Mapping[str, float] = field(default_factory=dict, repr=False)

    def alarms_at(self, threshold: float) -> dict[str, int | None]:
        """The alarms that another threshold would have given, by run id."""
        return {run: _earliest(charts, threshold) for run, charts in self.charts.items()}


def _earliest(charts: Sequence[Chart], threshold: float) -> int | None:
    found = [first_alarm(statistic, where, threshold) for where, statistic in charts]
    return min((alarm for alarm in found if alarm is not None), default=None)


@dataclass(frozen=True)
class Sides:
    """One signal of one run: positions (T,) and its one-sided worst series, each (T,), positive is bad."""

    positions: np.ndarray
    series: tuple[np.ndarray, ...]


@dataclass
class Detection:
    """The runs of an experiment on one track. Z-scores of a signal are computed once, whatever charts follow."""

    experiment: Experiment
    track: str = "reference"

    @cached_property
    def _sides(self) -> dict[str, Mapping[str, Sides] | DeclinedSignal]:
        return {}

    def sides(self, signal: str) -> Mapping[str, Sides]:
        """By run id, for every run. Raises DeclinedSignal where the track cannot judge the signal, or no run has it."""
        if signal not in self._sides:
            try:
                self._sides[signal] = self._judge(signal)
            except (DeclinedSignal, TraceError) as reason:
                self._sides[signal] = DeclinedSignal(str(reason))
        found = self._sides[signal]
        if isinstance(found, DeclinedSignal):
            raise found
        return found

    def aligned(self, signal: str) -> dict[str, Aligned]:
        """By run id, the signal on the positions of the reference runs."""
        experiment = self.experiment
        if signal not in experiment.signals:
            raise DeclinedSignal(f"{signal}: no run of {experiment.model} has this signal")
        runs = [(run, run.signal(signal)) for run in experiment.runs]
        grids = [positions(series, experiment.axis) for run, series in runs if run.role == "reference"]
        grid = next((grid for grid in grids if len(grid)), None)
        if grid is None:
            raise DeclinedSignal(f"{signal}: no sample in {experiment.horizon:,} {experiment.axis}")
        return {run.trace.run_id: hold(series, experiment.axis, grid) for run, series in runs}

    def _judge(self, signal: str) -> dict[str, Sides]:
        aligned = self.aligned(signal)
        reference = [aligned[run.trace.run_id] for run in self.experiment.of("reference")]
        band = fit_band(self.track, signal, reference)
        bad = self.experiment.signals[signal]["bad"]
        return {run: Sides(series.positions, tuple(oriented(band.z(series), bad))) for run, series in aligned.items()}

    def detect(self, name: str, signals: Sequence[str], rule: AlarmRule, alpha: float) -> Detector:
        """The detector of these signals at a false-alarm rate, calibrated jointly.

        One that the track cannot judge, or whose rule looks ahead or raises, is returned ``declined``. Raises
        ValueError where there are too few calibration runs for alpha.
        """
        if self.track == "published":
            return self._published(name, signals)
        try:
            charts = self._charts(signals, rule)
        except (DeclinedSignal, BadEntrant) as reason:
            return Detector(name, tuple(signals), declined=str(reason))
        maxima = {}
        for run in self._runs("calibration"):
            values = np.concatenate([statistic for _, statistic in charts[run]])
            if np.isnan(values).all():
                return Detector(name, tuple(signals), declined=f"{name}: too few samples for the {self.track} track")
            maxima[run] = float(np.nanmax(values))
        threshold = conformal_threshold(list(maxima.values()), alpha)
        scored = {run: charts[run] for run in self._runs("test", "faulty")}
        alarms = {run: _earliest(found, threshold) for run, found in scored.items()}
        return Detector(name, tuple(signals), threshold, alarms, None, scored, maxima)

    def _runs(self, *roles: str) -> list[str]:
        return [run.trace.run_id for run in self.experiment.of(*roles)]

    def _charts(self, signals: Sequence[str], rule: AlarmRule) -> dict[str, list[Chart]]:
        """By run id, one chart a signal; ``both`` is the larger of two one-sided ones."""
        charts: dict[str, list[Chart]] = {run: [] for run in self._runs("calibration", "test", "faulty")}
        for signal in signals:
            sides = self.sides(signal)
            reference = [sides[run] for run in self._runs("reference")]
            fitted = []
            for side in range(len(reference[0].series)):
                try:
                    one = rule.calibrate([run.series[side] for run in reference])
                except BadEntrant:
                    raise
                except ValueError as error:
                    raise DeclinedSignal(f"{signal}: {error}") from None
                check_causal(one, reference[0].series[side])
                fitted.append(one)
            for run, found in charts.items():
                statistics = [one.statistic(x) for one, x in zip(fitted, sides[run].series, strict=True)]
                found.append((sides[run].positions, np.fmax.reduce(statistics)))
        return charts

    def _published(self, name: str, signals: Sequence[str]) -> Detector:
        """The sources' own numbers on raw readings: no calibration, whatever false-alarm rate that has."""
        try:
            rules = {signal: published_rule(signal) for signal in signals}
            aligned = {signal: self.aligned(signal) for signal in signals}
        except (DeclinedSignal, TraceError) as reason:
            return Detector(name, tuple(signals), declined=str(reason))
        charts = {
            run: [(aligned[s][run].positions, rules[s].broken_at(aligned[s][run]).astype(float)) for s in signals]
            for run in self._runs("test", "faulty")
        }
        alarms = {run: _earliest(found, 0.5) for run, found in charts.items()}
        return Detector(name, tuple(signals), float("nan"), alarms, None, charts, {})


def own_past_is_healthy(run: ScoredRun, detector: Detector, window: int) -> bool:
    """Whether a run's fault begins after the first 2 ``window`` samples of every signal: what the self track needs."""
    if run.onset is None:
        return True
    charts = detector.charts[run.trace.run_id]
    return all(len(where) > 2 * window and run.onset > where[2 * window - 1] for where, _ in charts)
