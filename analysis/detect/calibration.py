"""Thresholds for live alarms out of healthy runs alone: conformal on path maxima, one for each signal or one for all.

Every signal is held against a track, its worst layer and head charted, and the largest statistic of each calibration
run taken. ``joint``: the signals are first put on one scale (``joint.member_scales``), so that alpha is the
probability that a healthy run alarms on any signal; without it, on a given one. Runs are split by their sorted ids:
the first set bands and scales (``reference``), the others the thresholds, and no run does both. As in
``alarms.conformal_threshold``, the promise is on average over calibrations and needs a new run to be exchangeable with
these: the same model, data and settings, another seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np

from foreshock.analysis.detect.alarms import chart_statistics, conformal_rank, conformal_threshold, oriented
from foreshock.analysis.detect.bands import DeclinedSignal, Floor, ReferenceBand, SelfBand, left_out_z
from foreshock.analysis.detect.joint import MIN_RUNS, member_scales
from foreshock.analysis.detect.rules import make_rule
from foreshock.analysis.detect.thresholds import SignalThreshold, Thresholds
from foreshock.analysis.runs.align import Aligned
from foreshock.experiments.trace import ATTACHED, Trace, TraceError
from foreshock.experiments.validation import check_named
from foreshock.monitors.signal import LEVEL, RATIO, Signal

SELF, REFERENCE, FLOOR = "self", "reference", "floor"
CALIBRATED_TRACKS = (SELF, REFERENCE, FLOOR)
ONLINE_CHARTS = ("shewhart", "ewma", "cusum", "glr")
"""Charts that a live watch follows, each also with ``persistence``."""
SETS_BANDS = {SELF: 0, REFERENCE: 4, FLOOR: 0}
"""By track, the fewest runs that its bands take."""
SETS_SCALES = MIN_RUNS
"""The fewest runs that joint scales take: with fewer, signals would share a spread, and the most restless signal would
set the limits of all."""
MOST_LACKING = 0.05
"""Share of the steps of all runs that a run may lack: those that its GradScaler threw away have no readings."""

NO_READING = "has no reading of it"
"""How the reason ends why a signal is declined that a run has too few steps for."""

Band = ReferenceBand | SelfBand | Floor


def calibrated(
    runs: Sequence[Trace], *, alpha: float, track: str = SELF, chart: Mapping[str, Any], joint: bool = True
) -> Thresholds:
    """The thresholds that healthy runs set, cut to the shortest of them.

    Raises ValueError for too few runs for alpha, naming the smallest that they support, and for a chart or track that
    is not followed live; TraceError for runs of different models or signals.
    """
    check_named([track], CALIBRATED_TRACKS, "track")
    check_named([str(chart.get("chart"))], ONLINE_CHARTS, "chart")
    runs = sorted(runs, key=lambda run: run.run_id)
    reference, calibration = _split(runs, alpha, SETS_BANDS[track], joint)
    signals = _alike(runs)
    shortest = min(runs, key=lambda run: int(run.manifest["steps_done"]))
    horizon = int(shortest.manifest["steps_done"])
    known: dict[str, SignalThreshold] = {}
    maxima: dict[str, tuple[list[float], list[float]]] = {}
    declined: dict[str, str] = {}
    for name, signal in signals.items():
        try:
            known[name], *of_runs = _judged(signal, reference, calibration, track, chart, horizon)
        except ValueError as reason:
            declined[name] = str(reason)
        else:
            maxima[name] = (of_runs[0], of_runs[1])
    if not known:
        raise ValueError(
            f"no signal of these runs can be calibrated: {next(iter(declined.values()), 'they have none')}"
        )
    alone = {name: conformal_threshold(after, alpha) for name, (_, after) in maxima.items()}
    limits = _joint_limits(maxima, alpha) if joint else alone
    return Thresholds(
        runs=tuple(run.run_id for run in calibration),
        reference_runs=tuple(run.run_id for run in reference),
        alpha=alpha,
        horizon_steps=horizon,
        horizon_run=shortest.run_id,
        track=track,  # type: ignore[arg-type]
        chart=dict(chart),
        joint=joint,
        model=runs[0].manifest.get(ATTACHED),
        signals={
            name: known[name].model_copy(update={"limit": limit, "alone": alone[name]})
            for name, limit in limits.items()
        },
        declined=declined,
    )


def _split(runs: Sequence[Trace], alpha: float, for_bands: int, joint: bool) -> tuple[Sequence[Trace], Sequence[Trace]]:
    """Runs that set bands and scales, and those that set thresholds: half of all, as many as alpha and scales allow."""
    least = max(for_bands, SETS_SCALES * joint)
    if least == 0:
        conformal_rank(len(runs), alpha)
        return (), runs
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not allowed: between 0 and 1")
    needed = math.ceil(1 / alpha - 1 - 1e-9)
    first = max(least, len(runs) - max(needed, math.ceil(len(runs) / 2)))
    left = len(runs) - first
    if left < needed:
        smallest = f"the smallest is {1 / (left + 1):.4g}" if left > 0 else f"at least {least + 1} runs are needed"
        raise ValueError(
            f"{len(runs)} healthy runs, {min(least, len(runs))} of them for bands and scales, cannot support "
            f"alpha={alpha}: {smallest}" + (f"; joint=false needs {for_bands + needed} runs" if joint else "")
        )
    return runs[:first], runs[first:]


def _alike(runs: Sequence[Trace]) -> dict[str, Signal]:
    """The signals that have a threshold, by name. Raises TraceError where a run is of another model or has others."""
    first = runs[0]
    for run in runs[1:]:
        for what, here, there in (
            ("model", _model(run), _model(first)),
            ("signals", set(run.described), set(first.described)),
        ):
            if here != there:
                raise TraceError(f"runs {first.run_id} and {run.run_id} differ in their {what}: calibrate them apart")
    return {name: signal for name, signal in first.described.items() if signal.kind in (LEVEL, RATIO)}


def _model(run: Trace) -> Any:
    return run.manifest.get(ATTACHED) or run.manifest["config"].get("model")


def _judged(
    signal: Signal,
    reference: Sequence[Trace],
    calibration: Sequence[Trace],
    track: str,
    chart: Mapping[str, Any],
    horizon: int,
) -> tuple[SignalThreshold, list[float], list[float]]:
    """A signal's yardstick, and its path maxima in the reference and in the calibration runs."""
    cut = {run.run_id: _cut(run, signal, horizon) for run in (*reference, *calibration)}
    aligned = _alike_in_steps(signal, cut, track)
    before = [aligned[run.run_id] for run in reference]
    band = _band(signal, track, before)
    sides = [oriented(band.z(aligned[run.run_id]), signal.bad) for run in calibration]
    left_out = [oriented(z, signal.bad) for z in (left_out_z(before) if track == REFERENCE else map(band.z, before))]
    shape = next(iter(aligned.values())).values.shape[1:]
    known = {
        "limit": 0.0,
        "shape": shape,
        **{name: getattr(signal, name) for name in ("every_steps", "bad", "jittered")},
    }
    if isinstance(band, ReferenceBand):
        known |= {"positions": band.positions.tolist(), "centre": band.centre.tolist(), "scale": band.scale.tolist()}
    if isinstance(band, Floor):
        known |= {"expected": band.expected}
    maxima = [_maxima(signal, part, chart, track) for part in (left_out, sides)]
    return SignalThreshold.model_validate(known), maxima[0], maxima[1]


def _cut(run: Trace, signal: Signal, horizon: int) -> Aligned:
    if signal.name not in run.signals:
        raise DeclinedSignal(f"{signal.name}: run {run.run_id} {NO_READING}")
    series = run.signals[signal.name]
    kept = series.steps <= horizon
    return Aligned(series.steps[kept], series.values[kept], series.undefined[kept])


def _alike_in_steps(signal: Signal, aligned: Mapping[str, Aligned], track: str) -> Mapping[str, Aligned]:
    """The runs, of which each may lack a few steps that others have; on the reference track, at the steps of all."""
    grid = np.unique(np.concatenate([series.positions for series in aligned.values()]))
    for run, series in aligned.items():
        if len(series.positions) < (1 - MOST_LACKING) * len(grid):
            raise DeclinedSignal(f"{signal.name}: run {run} was read at other steps")
    if track != REFERENCE:
        return aligned
    shared = reduce(np.intersect1d, [series.positions for series in aligned.values()])
    kept = {run: np.isin(series.positions, shared) for run, series in aligned.items()}
    return {
        run: Aligned(shared, series.values[kept[run]], series.undefined[kept[run]]) for run, series in aligned.items()
    }


def _band(signal: Signal, track: str, reference: Sequence[Aligned]) -> Band:
    if track == REFERENCE:
        return ReferenceBand.fit(signal.name, reference)
    if track == SELF:
        return SelfBand()
    if signal.kind != RATIO:
        raise DeclinedSignal(f"{signal.name}: no ratio to predicted noise, so the floor track has no say")
    return Floor(1.0)


def _maxima(signal: Signal, runs: Sequence[Sequence[np.ndarray]], chart: Mapping[str, Any], track: str) -> list[float]:
    if not runs:
        return []
    charted = chart_statistics(runs, [make_rule(**chart)] * len(runs[0]))
    if any(np.isnan(statistic).all() for statistic in charted):
        raise DeclinedSignal(f"{signal.name}: too few samples for the {track} track")
    maxima = [float(np.nanmax(statistic)) for statistic in charted]
    if not np.isfinite(maxima).all():
        raise DeclinedSignal(f"{signal.name}: not finite in a healthy run")
    return maxima


def _joint_limits(maxima: Mapping[str, tuple[list[float], list[float]]], alpha: float) -> dict[str, float]:
    """By signal, where its statistic reaches the one threshold of all."""
    scales = dict(zip(maxima, member_scales([before for before, _ in maxima.values()], _usual), strict=True))
    runs = zip(*(scales[name].of(np.array(after)) for name, (_, after) in maxima.items()), strict=True)
    threshold = conformal_threshold([max(run) for run in runs], alpha)
    return {name: scale.undone(threshold) for name, scale in scales.items()}


def _usual(spread_M: np.ndarray) -> float:
    """For a signal whose maxima are all equal: the median of the spreads that are not 0, else 0."""
    spreads = spread_M[spread_M > 0]
    return float(np.median(spreads)) if len(spreads) else 0.0
