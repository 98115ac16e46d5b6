"""Every detector's alarm in every run: signals held against a track, charted, and given a threshold on healthy runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from foreshock.analysis.detect.alarms import chart_statistics, conformal_threshold, first_alarm, fitted, oriented
from foreshock.analysis.detect.bands import DeclinedSignal, Exact
from foreshock.analysis.detect.charts import AlarmRule
from foreshock.analysis.detect.entrants import BadEntrant, FromFile, check_causal
from foreshock.analysis.detect.joint import Scale, member_scales
from foreshock.analysis.detect.tracks.base import Band, Charted, Raw, Track
from foreshock.analysis.detect.tracks.by_name import TRACKS
from foreshock.analysis.runs.align import Aligned, hold, positions, thin
from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.experiments.trace import Series, TraceError
from foreshock.faults.card import BENIGN
from foreshock.monitors.cadence import Cadence
from foreshock.monitors.signal import EXACT, Signal

Chart = tuple[np.ndarray, np.ndarray]
"""Positions and statistic of one signal in one run, both (T,)."""


@dataclass(frozen=True)
class Detector:
    """Some signals that share one threshold: an alarm is raised when any of their charts is above it.

    alarms: by run id, positions on the experiment's axis; charts: by run id, one for each signal, as charted; scales:
    of each signal, where several share a threshold (``analysis.detect.joint``); maxima: the largest statistic of each
    calibration run, on that scale as the threshold is; declined: why the track cannot judge it, or None.
    """

    name: str
    signals: tuple[str, ...]
    threshold: float = float("nan")
    alarms: Mapping[str, int | None] = field(default_factory=dict)
    declined: str | None = None
    charts: Mapping[str, Sequence[Chart]] = field(default_factory=dict, repr=False)
    maxima: Mapping[str, float] = field(default_factory=dict, repr=False)
    scales: tuple[Scale, ...] = ()

    def limits(self, threshold: float | None = None) -> tuple[float, ...]:
        """What each signal's chart must pass for an alarm, at the detector's threshold or another."""
        threshold = self.threshold if threshold is None else threshold
        return tuple(scale.undone(threshold) for scale in self.scales or (Scale(),) * len(self.signals))

    def alarms_at(self, threshold: float) -> dict[str, int | None]:
        """The alarms that another threshold would have given, by run id."""
        limits = self.limits(threshold)
        return {run: _earliest(charts, limits) for run, charts in self.charts.items()}


def _earliest(charts: Sequence[Chart], limits: Sequence[float]) -> int | None:
    alarms = [first_alarm(statistic, where, limit) for (where, statistic), limit in zip(charts, limits, strict=True)]
    return min((alarm for alarm in alarms if alarm is not None), default=None)


@dataclass(frozen=True)
class Sides:
    """One signal of one run: positions (T,) and its one-sided worst series, each (T,), positive is bad."""

    positions: np.ndarray
    series: tuple[np.ndarray, ...]


@dataclass
class Detection:
    """The runs of an experiment on one track. Z-scores of a signal are computed once, whatever charts follow."""

    experiment: Experiment
    track: Track = TRACKS["reference"]

    @cached_property
    def _reference(self) -> dict[str, list[Aligned]]:
        return {}

    @cached_property
    def _left_out_sides(self) -> dict[str, list[tuple[np.ndarray, ...]]]:
        return {}

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
        sides = self._sides[signal]
        if isinstance(sides, DeclinedSignal):
            raise sides
        return sides

    def left_out(self, signal: str) -> list[tuple[np.ndarray, ...]]:
        """Of each reference run its one-sided worst series, judged without its own part in the band."""
        if signal not in self._left_out_sides:
            sides = self.sides(signal)
            judged = [sides[run].series for run in self._runs("reference")]
            described = self.experiment.signals[signal]
            if described.kind != EXACT:
                assert isinstance(self.track, Charted)
                judged = self.track.left_out(self._reference[signal], judged, described.bad)
            self._left_out_sides[signal] = judged
        return self._left_out_sides[signal]

    def _described(self, signal: str) -> Signal:
        """What the signal is. Raises DeclinedSignal where no run has it."""
        if signal not in self.experiment.signals:
            raise DeclinedSignal(f"{signal}: no run of {self.experiment.model} has this signal")
        return self.experiment.signals[signal]

    def aligned(self, signal: str) -> dict[str, Aligned]:
        """By run id, the signal on the positions of the reference runs."""
        experiment, cadence = self.experiment, self._described(signal).cadence
        scored = cadence.thinned(experiment.score_every)
        runs = [(run, thin(run.signal(signal), scored)) for run in experiment.runs]
        reference = next((series for run, series in runs if run.role == "reference" and len(series.steps)), None)
        if reference is None:
            raise DeclinedSignal(f"{signal}: no sample in {experiment.horizon:,} {experiment.axis}")
        for run, series in runs:
            _check_cadence(signal, run, cadence)
            _check_whole(signal, run, series, reference, cadence)
        grid = positions(reference, experiment.axis)
        return {run.trace.run_id: hold(series, experiment.axis, grid) for run, series in runs}

    def _judge(self, signal: str) -> dict[str, Sides]:
        described = self._described(signal)
        self.track.check_applies(described)
        aligned = self.aligned(signal)
        self._reference[signal] = [aligned[run.trace.run_id] for run in self.experiment.of("reference")]
        if described.kind == EXACT:
            band: Exact | Band = Exact()
            bad = "up"
            for run in self._runs("reference", "calibration"):
                if (band.z(aligned[run]) > 0).any():
                    raise DeclinedSignal(f"{signal}: is not 0 in every healthy run, as {run} shows")
        else:
            assert isinstance(self.track, Charted)
            band, bad = self.track.band(described, self._reference[signal]), described.bad
        judged = {}
        for runs, together in _side_by_side(aligned):
            z = np.stack(np.split(band.z(together), len(runs), axis=2))
            for run, *series in zip(runs, *oriented(z, bad), strict=True):
                judged[run] = Sides(together.positions, tuple(series))
        return judged

    def detect(self, name: str, signals: Sequence[str], rule: AlarmRule, alpha: float) -> Detector:
        """The detector of these signals at a false-alarm rate, calibrated jointly.

        One that the track cannot judge, or whose rule looks ahead or raises, is returned ``declined``. Raises
        ValueError where there are too few calibration runs for alpha.
        """
        if isinstance(self.track, Raw):
            return self._detect_raw(self.track, name, signals, alpha)
        try:
            rules = {signal: self._rules(signal, rule) for signal in signals}
            charts = self._charts(rules)
            scales = self._scales(rules)
        except (DeclinedSignal, BadEntrant) as reason:
            return Detector(name, tuple(signals), declined=str(reason))
        maxima = {}
        for run in self._runs("calibration"):
            values = np.concatenate([scale.of(chart) for scale, (_, chart) in zip(scales, charts[run], strict=True)])
            if np.isnan(values).all():
                return Detector(
                    name, tuple(signals), declined=f"{name}: too few samples for the {self.track.name} track"
                )
            maxima[run] = float(np.nanmax(values))
            if not np.isfinite(maxima[run]):
                return Detector(name, tuple(signals), declined=f"{name}: not finite in calibration run {run}")
        threshold = conformal_threshold(list(maxima.values()), alpha)
        scored = {run: charts[run] for run in self._runs("test", "faulty", BENIGN)}
        detector = Detector(name, tuple(signals), threshold, charts=scored, maxima=maxima, scales=scales)
        if isinstance(rule, FromFile):
            try:
                self._check_causal(rules, detector.limits())
            except BadEntrant as reason:
                return Detector(name, tuple(signals), declined=str(reason))
        return replace(detector, alarms=detector.alarms_at(threshold))

    def _check_causal(self, rules: Mapping[str, Sequence[AlarmRule]], limits: Sequence[float]) -> None:
        """Looks for a statistic that knows the future in every run, above all where it decides something."""
        for (signal, of_sides), limit in zip(rules.items(), limits, strict=True):
            sides = self.sides(signal)
            for run in self._runs("calibration", "test", "faulty", BENIGN):
                for rule, x in zip(of_sides, sides[run].series, strict=True):
                    statistic = rule.statistic(x)
                    alarm = np.flatnonzero(statistic > limit)[:1]
                    largest = np.flatnonzero(statistic == np.nanmax(statistic, initial=-np.inf))[:1]
                    check_causal(rule, x, [*alarm, *largest])

    def _runs(self, *roles: str) -> list[str]:
        return [run.trace.run_id for run in self.experiment.of(*roles)]

    def _rules(self, signal: str, rule: AlarmRule) -> list[AlarmRule]:
        """The rule for each side of a signal, calibrated on the reference runs."""
        sides = self.sides(signal)
        try:
            return fitted(rule, [sides[run].series for run in self._runs("reference")])
        except BadEntrant:
            raise
        except ValueError as error:
            raise DeclinedSignal(f"{signal}: {error}") from None

    def _charts(self, rules: Mapping[str, Sequence[AlarmRule]]) -> dict[str, list[Chart]]:
        """By run id, one chart a signal; ``both`` is the larger of two one-sided ones."""
        charts: dict[str, list[Chart]] = {run: [] for run in self._runs("calibration", "test", "faulty", BENIGN)}
        for signal, of_sides in rules.items():
            sides = self.sides(signal)
            charted = chart_statistics([sides[run].series for run in charts], of_sides)
            for (run, of_run), statistic in zip(charts.items(), charted, strict=True):
                of_run.append((sides[run].positions, statistic))
        return charts

    def _scales(self, rules: Mapping[str, Sequence[AlarmRule]]) -> tuple[Scale, ...]:
        """The members' scales; one signal by itself needs none."""
        if len(rules) < 2:
            return (Scale(),) * len(rules)
        if len(self._runs("reference")) < 2:
            raise DeclinedSignal(f"{', '.join(rules)}: one reference run, a joint detector needs at least 2")
        maxima = []
        for signal, of_sides in rules.items():
            charted = chart_statistics(self.left_out(signal), of_sides)
            if any(np.isnan(chart).all() for chart in charted):
                raise DeclinedSignal(f"{signal}: too few samples for the {self.track.name} track")
            maxima.append([np.nanmax(chart) for chart in charted])
            if not np.isfinite(maxima[-1]).all():
                raise DeclinedSignal(f"{signal}: not finite in a reference run")
        return member_scales(maxima)

    def _detect_raw(self, track: Raw, name: str, signals: Sequence[str], alpha: float) -> Detector:
        """The detector of raw readings, each signal by itself, at the number of the track."""
        try:
            described = {signal: self._described(signal) for signal in signals}
            for signal in described.values():
                track.check_applies(signal)
            aligned = {signal: self.aligned(signal) for signal in signals}
        except (DeclinedSignal, TraceError) as reason:
            return Detector(name, tuple(signals), declined=str(reason))
        looks = sum(max(runs[run].values.size for run in self._runs("reference")) for runs in aligned.values())
        limit = track.limit(looks, alpha)
        charts = {
            run: [
                (runs[run].positions, track.statistic(described[signal], runs[run])) for signal, runs in aligned.items()
            ]
            for run in self._runs("faulty", BENIGN, *track.healthy_roles)
        }
        threshold = limit if track.thresholds_are_scales else float("nan")
        detector = Detector(name, tuple(signals), threshold, charts=charts)
        return replace(detector, alarms=detector.alarms_at(limit))


def _side_by_side(aligned: Mapping[str, Aligned]) -> Iterator[tuple[list[str], Aligned]]:
    """Runs of the same positions as one wide run, their heads next to each other: a band judges them in one go."""
    alike: dict[tuple[bytes, tuple[int, ...]], list[str]] = {}
    for run, series in aligned.items():
        alike.setdefault((series.positions.tobytes(), series.values.shape), []).append(run)
    for runs in alike.values():
        values, undefined = (
            np.concatenate([getattr(aligned[run], part) for run in runs], axis=2) for part in ("values", "undefined")
        )
        yield runs, Aligned(aligned[runs[0]].positions, values, undefined)


def _check_cadence(signal: str, run: ScoredRun, cadence: Cadence) -> None:
    """Raises TraceError where some runs have a signal at jittered steps and others at multiples."""
    own = run.trace.described[signal].cadence
    if own.moves != cadence.moves:
        here, there = (f"at {'jittered steps' if moves else 'multiples'}" for moves in (own.moves, cadence.moves))
        raise TraceError(
            f"run {run.trace.run_id} has {signal} {here} of {own.every_steps}, other runs {there}: train these runs "
            "again together, which reads again what differs"
        )


def _check_whole(signal: str, run: ScoredRun, series: Series, reference: Series, cadence: Cadence) -> None:
    """Raises TraceError where a run lacks samples that the reference runs have and that it trained long enough for.

    A run that lost its end, or all of a signal, would look as if nothing had alarmed in it.
    """
    done = run.trace.manifest["steps_done"]
    last = min(done, reference.steps[-1])
    if run.role == "reference" and len(series.steps) and cadence.next_after(int(series.steps[-1])) <= last:
        raise TraceError(f"run {run.trace.run_id}: {signal} ends at step {series.steps[-1]}, the run at {done}")
    expected, recorded = (steps[steps <= last] for steps in (reference.steps, series.steps))
    if not np.array_equal(expected, recorded):
        lost = np.setdiff1d(expected, recorded)
        said = f"no sample of {signal} at step {lost[0]}" if len(lost) else f"samples of {signal} that no other run has"
        raise TraceError(f"run {run.trace.run_id} has {said}")
