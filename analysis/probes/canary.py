"""Short runs after a change against a healthy band: are they the same, are they healthy, where do they leave the band.

Each run is held against the joint thresholds of the band. With n calibration runs and the threshold at rank k of their
path maxima, the number of K exchangeable healthy runs above it is beta-binomial with K, n + 1 - k and k. The verdict is
``outside`` where so many runs stand above as healthy ones would with probability at most alpha, and at once where a run
breaks down or an exact signal is not 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import betabinom
from scipy.stats import t as student

from foreshock.analysis.detect.against import on_band, statistic, z_scores
from foreshock.analysis.detect.alarms import conformal_rank
from foreshock.analysis.detect.thresholds import SignalThreshold, Thresholds
from foreshock.analysis.probes.band import Band, check_no_copies
from foreshock.experiments.trace import Series, Trace
from foreshock.monitors.signal import CLOCK, EXACT, Signal

HELD_OUT = "held_out_loss"
BROKEN_DOWN = ("diverged", "non_finite")
"""End reasons of a training that broke down; ``stopped`` or ``running`` say of a watch or a process that it ended."""
LEVEL = 0.95
"""Of the interval of held-out loss's change."""


@dataclass(frozen=True)
class Breach:
    """The first step at which a signal of a run stands outside the band.

    layer, head: the worst ones, None where the signal has no such axis; statistic, limit: of the chart, None for an
    exact signal, which has none.
    """

    run: str
    signal: str
    step: int
    layer: int | None
    head: int | None
    value: float
    statistic: float | None = None
    limit: float | None = None

    @property
    def over_limit(self) -> float:
        """The statistic over its limit; infinite for an exact signal, and for a limit that is not positive."""
        if self.statistic is None or self.limit is None or self.limit <= 0:
            return np.inf
        return self.statistic / self.limit


@dataclass(frozen=True)
class Difference:
    """The first step at which a run and its healthy twin read other numbers, and the signals that do."""

    step: int
    signals: tuple[str, ...]


@dataclass(frozen=True)
class Canary:
    """One run after the change. ended: how it broke down, or None; twin: the healthy run of its seed, or None.

    breaches: in the order of their steps; not_compared: signals of the band that the run does not have or describe, and
    those of another shape or cadence; steps: of the band, which are those that are compared.
    """

    run: Trace
    ended: str | None
    twin: Trace | None
    breaches: tuple[Breach, ...]
    not_compared: tuple[str, ...]
    steps: int

    @property
    def outside(self) -> bool:
        return self.ended is not None or bool(self.breaches)

    @property
    def certain(self) -> bool:
        """Whether no healthy run is like it, whatever alpha: it broke down, or an exact signal is not 0."""
        return self.ended is not None or any(breach.statistic is None for breach in self.breaches)

    @cached_property
    def difference(self) -> Difference | None:
        """From the twin; None where every reading is the same, or there is no twin."""
        return None if self.twin is None else first_difference(self.run, self.twin, self.steps)

    @property
    def held_out_change(self) -> float | None:
        """Held-out loss in nats at the last step of both, less that of the twin; None where one has none, or where the
        held-out text is another."""
        if self.twin is None or HELD_OUT not in self.run.signals or HELD_OUT not in self.twin.signals:
            return None
        if _text(self.run) != _text(self.twin):
            return None
        here, there = self.run.signals[HELD_OUT], self.twin.signals[HELD_OUT]
        shared = np.intersect1d(here.steps, there.steps)
        if not len(shared):
            return None
        last = [float(series.values[series.steps == shared[-1]].item()) for series in (here, there)]
        return last[0] - last[1]


@dataclass(frozen=True)
class Verdict:
    """needed: how many runs must stand outside before the verdict does, at the band's alpha."""

    canaries: tuple[Canary, ...]
    needed: int

    @property
    def outside(self) -> bool:
        many = sum(canary.outside for canary in self.canaries) >= self.needed
        return many or any(canary.certain for canary in self.canaries)

    @property
    def identical(self) -> bool:
        """Whether every run reads the numbers of its healthy twin, bit for bit."""
        return all(canary.twin is not None and canary.difference is None for canary in self.canaries)

    @property
    def breaches(self) -> list[Breach]:
        return [breach for canary in self.canaries for breach in canary.breaches]

    @cached_property
    def held_out_changes(self) -> list[float]:
        """Of the runs that have a twin, in nats."""
        return [change for canary in self.canaries if (change := canary.held_out_change) is not None]

    @cached_property
    def held_out_interval(self) -> tuple[float, float] | None:
        """Of the mean change, by Student's t over seeds at ``LEVEL``; None for one run, or where all change alike."""
        changes = self.held_out_changes
        if len(changes) < 2 or not np.isfinite(changes).all() or np.ptp(changes) == 0:
            return None
        low, high = student.interval(
            LEVEL, len(changes) - 1, np.mean(changes), np.std(changes, ddof=1) / len(changes) ** 0.5
        )
        return float(low), float(high)

    @property
    def shifted(self) -> bool:
        """Whether the interval of held-out loss's change leaves 0 out: seeds are paired, so that it is far sharper than
        the band, and finds what is no harm too."""
        return self.held_out_interval is not None and not self.held_out_interval[0] <= 0 <= self.held_out_interval[1]


def judge(band: Band, runs: Sequence[Trace]) -> Verdict:
    """Hold runs after a change against a band.

    Raises ValueError for no run, for one shorter than the band, for one that has none of its signals, and for copies.
    """
    if not runs:
        raise ValueError("there is no run after the change to compare")
    check_no_copies(runs)
    canaries = tuple(_canary(band, run) for run in runs)
    return Verdict(canaries, runs_needed(band.thresholds, len(runs)))


def runs_needed(thresholds: Thresholds, count: int) -> int:
    """The smallest number of ``count`` runs that, if they were healthy, stand outside with probability <= alpha."""
    n = len(thresholds.runs)
    rank = conformal_rank(n, thresholds.alpha)
    above = betabinom(count, n + 1 - rank, rank)
    allowed = thresholds.alpha * (1 + 1e-9)  # sums of the distribution round
    return next((number for number in range(1, count + 1) if above.sf(number - 1) <= allowed), count)


def _canary(band: Band, run: Trace) -> Canary:
    steps, known = int(run.manifest["steps_done"]), band.thresholds.signals
    ended = f"{run.end_reason} at step {steps:,}" if run.end_reason in BROKEN_DOWN else None
    if ended is None and steps < band.steps:
        early = "" if run.end_reason == "completed" else f" ({run.end_reason})"
        raise ValueError(f"run {run.run_id}{early} has {steps:,} steps, and the band {band.steps:,}: train it as long")
    compared = {name for name, threshold in known.items() if _is_alike(run, name, threshold)}
    if not compared:
        raise ValueError(f"run {run.run_id} has none of the {len(known)} signals of the band as they were read there")
    breaches: list[Breach] = []
    for name, series in run.signals.items():
        if name in run.described and run.described[name].kind == EXACT:
            breaches += _exact_breach(run.run_id, run.described[name], series, band.steps)
        elif name in compared:
            breaches += _breach(run.run_id, run.described[name], series, known[name], band.thresholds.chart)
    breaches.sort(key=lambda breach: (breach.step, -breach.over_limit))
    return Canary(run, ended, band.twin(run), tuple(breaches), tuple(sorted(known.keys() - compared)), band.steps)


def _is_alike(run: Trace, name: str, threshold: SignalThreshold) -> bool:
    """Whether a run has and describes a signal as the runs of the band do."""
    if name not in run.signals or name not in run.described:
        return False
    return threshold.unlike(run.described[name], run.signals[name].values.shape[1:]) is None


def _exact_breach(run: str, signal: Signal, series: Series, steps: int) -> list[Breach]:
    wrong = (series.values != 0) & ~series.undefined & (series.steps <= steps)[:, None, None]
    if not wrong.any():
        return []
    at, layer, head = (int(index) for index in np.argwhere(wrong)[0])
    value = float(series.values[at, layer, head])
    return [Breach(run, signal.name, int(series.steps[at]), *_place(signal, layer, head), value)]


def _breach(
    run: str, signal: Signal, series: Series, known: SignalThreshold, chart: Mapping[str, object]
) -> list[Breach]:
    aligned = on_band(series, known)
    if not len(aligned.positions):
        return []
    z = z_scores(aligned, known)
    charted = statistic(z, known, chart)
    above = charted > known.limit
    if not above.any():
        return []
    at = int(above.argmax())
    bad = {"up": z[at], "down": -z[at], "both": np.abs(z[at])}[signal.bad]
    layer, head = np.unravel_index(int(np.where(np.isnan(bad), -np.inf, bad).argmax()), bad.shape)
    place = _place(signal, int(layer), int(head))
    value, limit = float(aligned.values[at, layer, head]), known.limit
    return [Breach(run, signal.name, int(aligned.positions[at]), *place, value, float(charted[at]), limit)]


def _place(signal: Signal, layer: int, head: int) -> tuple[int | None, int | None]:
    return (layer if "layer" in signal.axes else None, head if "head" in signal.axes else None)


def _text(run: Trace) -> tuple[object, object]:
    """What tells one held-out text from another."""
    return run.manifest.get("data_sha256"), run.manifest["config"].get("data", {}).get("held_out")


def first_difference(run: Trace, twin: Trace, steps: int) -> Difference | None:
    """Where a run first differs from its twin in the twin's signals, clocks left out; None where it nowhere does.

    steps: how many are looked at. A reading that one of them lacks is a difference; signals of the run alone are none.
    """
    first: dict[str, int] = {}
    for name, there in twin.signals.items():
        if name in twin.described and twin.described[name].kind == CLOCK:
            continue
        here = run.signals.get(name)
        step = int(there.steps[0]) if here is None else _first_other(here, there, steps)
        if step is not None:
            first[name] = step
    if not first:
        return None
    step = min(first.values())
    return Difference(step, tuple(sorted(name for name, at in first.items() if at == step)))


def _first_other(here: Series, there: Series, steps: int) -> int | None:
    if here.values.shape[1:] != there.values.shape[1:]:
        return int(there.steps[0])
    shared, at, other = np.intersect1d(here.steps, there.steps, return_indices=True)
    values, others = here.values[at], there.values[other]
    alike = (values.view(np.int64) == others.view(np.int64)) | (np.isnan(values) & np.isnan(others))
    alike &= here.undefined[at] == there.undefined[other]
    differs = np.union1d(shared[~alike.all(axis=(1, 2))], np.setxor1d(here.steps, there.steps))
    return int(differs[0]) if len(differs) and differs[0] <= steps else None
