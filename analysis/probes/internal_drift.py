"""What the monitors of a run say of it: rules that need no healthy run, and a canary's band where there is one."""

from __future__ import annotations

import numpy as np

from foreshock.analysis.detect.tracks.universal import universal_threshold
from foreshock.analysis.probes.band import Band
from foreshock.analysis.probes.canary import judge
from foreshock.analysis.probes.step import Step, judged
from foreshock.experiments.trace import Series, Trace
from foreshock.monitors.signal import CLOCK, EXACT, Signal

NAME = "internal drift"
LARGEST = 3
"""Shifts of signals that are noted."""


def compare(old: Trace, new: Trace, band: Band | None, alpha: float) -> Step:
    """Judge the new run's readings; the old run's are shown beside, and decide nothing.

    A finding of the new run that the old run has too is none: it cannot be why only the new one dips. alpha: of the
    universal track, over all readings of the run. Raises ValueError where the band is of other signals or longer runs.
    """
    before = {name for name, _ in broken(old, alpha)}
    findings = [said for name, said in broken(new, alpha) if name not in before]
    compared = f"{len(new.signals)} signals of run {new.run_id} with zero, rounding and run {old.run_id}"
    if band is not None:
        verdict = judge(band, [new])
        compared += f" and a band of {len(band.runs)} healthy runs"
        findings += [f"{breach.signal} outside its band at step {breach.step:,}" for breach in verdict.breaches]
        findings += [f"it ended early, {canary.ended}" for canary in verdict.canaries if canary.ended is not None]
    return judged(NAME, compared, findings, tuple(shifts(old, new)))


def broken(run: Trace, alpha: float) -> list[tuple[str, str]]:
    """Signals that no healthy run has so, with the first step: not finite, exact and not 0, above rounding's number."""
    looks = sum(_looks(series) for name, series in run.signals.items() if _described(run, name).universal)
    limit = universal_threshold(looks, alpha) if looks else np.inf
    found = []
    for name, series in run.signals.items():
        signal = _described(run, name)
        for said, wrong in _wrong(signal, series, limit).items():
            if wrong.any():
                at, layer, head = np.argwhere(wrong)[0]
                found.append((int(series.steps[at]), name, f"{name} {said} at step {series.steps[at]:,}", layer, head))
                break
    return [(name, said) for _, name, said, *_ in sorted(found, key=lambda each: each[0])]


def _described(run: Trace, name: str) -> Signal:
    return run.described.get(name) or Signal(name, "1", "both")


def _looks(series: Series) -> int:
    return int((~series.undefined).sum())


def _wrong(signal: Signal, series: Series, limit: float) -> dict[str, np.ndarray]:
    here = ~series.undefined
    with np.errstate(invalid="ignore"):
        return {
            "is not finite": here & ~np.isfinite(series.values) & (signal.kind != CLOCK),
            "is not 0": here & (series.values != 0) & (signal.kind == EXACT),
            f"is above {limit:.3g} times its rounding": here & (series.values > limit) & signal.universal,
        }


def shifts(old: Trace, new: Trace) -> list[str]:
    """The signals whose mean over the last quarter of shared steps has moved most, in spreads of the old run there.

    Two runs of different seeds differ as well: no rate is known, so it is a note.
    """
    sizes: dict[str, float] = {}
    for name in old.signals.keys() & new.signals.keys():
        if _described(new, name).kind == CLOCK:
            continue
        here, there = (_last(run.signals[name], old.signals[name], new.signals[name]) for run in (new, old))
        spread = there.std() if len(there) > 1 else 0.0
        if len(here) > 1 and spread > 0 and np.isfinite(here).all() and np.isfinite(there).all():
            sizes[name] = float((here.mean() - there.mean()) / spread)
    largest = sorted(sizes, key=lambda name: -abs(sizes[name]))[:LARGEST]
    return [f"{name} has moved by {sizes[name]:+.1f} spreads of the old run (no rate is known)" for name in largest]


def _last(series: Series, one: Series, other: Series) -> np.ndarray:
    """Means over layers and heads at the last quarter of the steps that both have."""
    shared = np.intersect1d(one.steps, other.steps)
    kept = np.isin(series.steps, shared[-max(1, len(shared) // 4) :])
    values = np.where(series.undefined, np.nan, series.values)[kept]
    values = values[~np.isnan(values).all(axis=(1, 2))]
    return np.asarray(np.nanmean(values, axis=(1, 2)))
