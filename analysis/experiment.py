"""The runs of one experiment as the report sees them, and every detector's alarm in each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from analysis.alarms import (
    Band,
    DeclinedSignal,
    chart_statistic,
    conformal_threshold,
    first_alarm,
    make_rule,
)
from analysis.align import AXES, hold, positions
from analysis.labels import divergence_step, drawup_threshold, is_degraded
from analysis.score import Score, score
from experiments import trace
from experiments.trace import Series, Trace

LABEL_SIGNAL = "held_out_loss"
HEALTHY_ROLES = ("reference", "calibration", "test")


@dataclass(frozen=True)
class ScoredRun:
    """A run with its role, fault name (None = healthy) and label, on the axis of its experiment.

    onset, divergence: positions, or None; horizon: where its scoring ends, the experiment's or its own end.
    """

    role: str
    fault: str | None
    seed: int
    trace: Trace
    onset: int | None
    divergence: int | None
    degraded: bool
    horizon: int

    def signal(self, name: str) -> Series:
        """One signal of the run; empty where the run ended before its first sample. Raises TraceError if unknown."""
        if name in self.trace.signals:
            return self.trace.signals[name]
        if name in self.trace.manifest["signals"]:
            return Series(np.empty(0, int), np.empty(0, int), np.empty((0, 1, 1)), np.empty((0, 1, 1), bool))
        raise trace.TraceError(f"run {self.trace.run_id} has no signal {name!r}: it was trained without its monitor")


@dataclass(frozen=True)
class Detector:
    """Some signals that share one threshold: an alarm is raised when any of their charts is above it.

    alarms: by run id, positions on the experiment's axis; declined: why the reference track cannot judge
    it, or None.
    """

    name: str
    signals: tuple[str, ...]
    threshold: float = float("nan")
    alarms: Mapping[str, int | None] = field(default_factory=dict)
    declined: str | None = None


@dataclass(frozen=True)
class Experiment:
    """An experiment's saved runs of one model, aligned by ``axis``. ``index``: the content of ``experiment.json``.

    horizon: the healthy runs' length on that axis. Runs may be shorter (a small batch that does not get as
    far in tokens) or longer (the rest is not looked at).
    """

    index: Mapping[str, Any]
    model: str
    axis: str
    runs: tuple[ScoredRun, ...]
    horizon: int
    drawup_threshold_nats: float
    mixed: tuple[str, ...] = ()

    @property
    def alpha(self) -> float:
        return self.index["scale"]["alpha"]

    @property
    def faults(self) -> list[str]:
        return list(self.index["experiment"]["faults"])

    def label(self, fault: str | None) -> str:
        """A fault's name for people."""
        return "healthy" if fault is None else self.index["experiment"]["faults"][fault].get("label", fault)

    def of(self, *roles: str, fault: str | None = None) -> list[ScoredRun]:
        return [run for run in self.runs if run.role in roles and (fault is None or run.fault == fault)]

    @cached_property
    def signals(self) -> Mapping[str, Mapping[str, Any]]:
        """Every signal of these runs with its unit, bad direction, axes and cadence."""
        return self.runs[0].trace.manifest["signals"]

    @cached_property
    def named_detectors(self) -> dict[str, tuple[str, ...]]:
        """The experiment's detectors, without the signals (and detectors) that this model does not have."""
        named = {
            name: tuple(signal for signal in signals if signal in self.signals)
            for name, signals in self.index["experiment"]["detectors"].items()
        }
        return {name: signals for name, signals in named.items() if signals}

    @cached_property
    def panels(self) -> dict[str, Mapping[str, Any]]:
        """The figure's panels, without those whose signals this model does not have."""
        panels = self.index["experiment"]["figure"]
        return {name: panel for name, panel in panels.items() if set(panel["signals"]) <= set(self.signals)}

    @cached_property
    def detectors(self) -> dict[str, Detector]:
        """The experiment's named detectors, then every signal by itself, each calibrated on its own."""
        alone = {name: (name,) for name in sorted(self.signals) if name != LABEL_SIGNAL}
        used = sorted({s for signals in self.named_detectors.values() for s in signals} | set(alone))
        statistics = {name: self._statistics(name) for name in used}
        return {
            name: self._detector(name, signals, statistics) for name, signals in (self.named_detectors | alone).items()
        }

    def _statistics(self, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]] | DeclinedSignal:
        """run id -> (positions, chart statistic) of one signal, on the reference track."""
        reference = [run.signal(name) for run in self.of("reference")]
        if not any(len(series.steps) for series in reference):
            return DeclinedSignal(f"{name}: no sample in {self.horizon:,} {self.axis}")
        grid = positions(reference[0], self.axis)
        try:
            band = Band.fit(name, [hold(series, self.axis, grid) for series in reference])
        except DeclinedSignal as reason:
            return reason
        rule = make_rule(**self.index["rule"])
        statistics = {}
        for run in self.of("calibration", "test", "faulty"):
            aligned = hold(run.signal(name), self.axis, grid)
            statistics[run.trace.run_id] = (
                aligned.positions,
                chart_statistic(band.z(aligned), self.signals[name]["bad"], rule),
            )
        return statistics

    def _detector(self, name: str, signals: Sequence[str], statistics: Mapping[str, Any]) -> Detector:
        declined = [str(statistics[s]) for s in signals if isinstance(statistics[s], DeclinedSignal)]
        if declined:
            return Detector(name, tuple(signals), declined="; ".join(declined))
        maxima = [
            max(float(np.nanmax(statistics[s][run.trace.run_id][1])) for s in signals) for run in self.of("calibration")
        ]
        threshold = conformal_threshold(maxima, self.alpha)
        alarms = {}
        for run in self.of("test", "faulty"):
            charts = [statistics[s][run.trace.run_id] for s in signals]
            found = [first_alarm(statistic, where, threshold) for where, statistic in charts]
            alarms[run.trace.run_id] = min((alarm for alarm in found if alarm is not None), default=None)
        return Detector(name, tuple(signals), threshold, alarms)

    def score(self, detector: Detector, run: ScoredRun) -> Score:
        return score(
            alarm=detector.alarms[run.trace.run_id], onset=run.onset, divergence=run.divergence, horizon=self.horizon
        )


def views(report: Path) -> list[tuple[str, str]]:
    """The (model, axis) pairs that an experiment is scored under, from its index."""
    index = _index(report)
    return [(model, axis) for model in index["experiment"]["models"] for axis in index["experiment"]["align"]]


def _index(report: Path) -> dict[str, Any]:
    index_file = report / "experiment.json"
    if not index_file.exists():
        raise trace.TraceError(f"{index_file} does not exist: run experiments.reproduce first")
    return json.loads(index_file.read_text())


def _check_roles(cells: Sequence[Mapping[str, Any]]) -> None:
    for role in ("calibration", "faulty"):
        if not any(cell["role"] == role for cell in cells):
            raise ValueError(f"scale.seeds.{role}=0: scoring needs at least one {role} run")
    healthy_seeds = [cell["seed"] for cell in cells if cell["fault"] is None]
    if len(set(healthy_seeds)) != len(healthy_seeds):
        raise ValueError("a healthy seed serves two roles: reference, calibration and test must be disjoint")


def _differences(traces: Sequence[Trace]) -> tuple[str, ...]:
    """What determines results and is not the same in all traces."""
    found = {what: sorted({t.manifest[what] for t in traces}) for what in ("source_sha256", "data_sha256", "torch")}
    return tuple(f"{what} {', '.join(v[:12] for v in values)}" for what, values in found.items() if len(values) > 1)


def load(
    report: Path, runs: Path, allow_mixed: bool = False, model: str | None = None, axis: str | None = None
) -> Experiment:
    """Read an experiment's index from ``report`` and its traces from ``runs``, and label every run.

    model, axis: one of the experiment's views, or None for its first. Runs made by different sources, data or
    torch versions are refused unless ``allow_mixed``, and then named. Raises TraceError where runs are missing,
    unfinished, damaged, mixed, or healthy ones have different lengths; ValueError where a role has no run, seeds
    of two roles overlap, or the view does not exist.
    """
    index = _index(report)
    model = index["experiment"]["models"][0] if model is None else model
    axis = index["experiment"]["align"][0] if axis is None else axis
    if axis not in AXES:
        raise ValueError(f"align={axis!r} is not allowed: one of {', '.join(AXES)}")
    cells = [cell for cell in index["runs"] if cell["model"] == model]
    _check_roles(cells)
    traces = [trace.read(runs / cell["run_id"]) for cell in cells]
    mixed = _differences(traces)
    if mixed and not allow_mixed:
        raise trace.TraceError(
            f"the runs in {runs} differ in {'; '.join(mixed)}: train them again together, or pass allow_mixed=true"
        )
    lengths = sorted({t.horizon for t, cell in zip(traces, cells, strict=True) if cell["fault"] is None})
    if len(lengths) > 1:
        raise trace.TraceError(f"the healthy runs in {runs} have different horizons: {lengths}")

    settings = index["label"]
    raw = [t.signals[LABEL_SIGNAL] for t in traces]
    healthy = [i for i, cell in enumerate(cells) if cell["fault"] is None]
    longest = max(healthy, key=lambda i: len(raw[i].steps))  # a healthy run that broke off must not cut the others
    grid = positions(raw[longest], axis)
    horizon = lengths[0] if axis == "steps" else traces[longest].manifest["tokens_done"]
    held_out = [hold(series, axis, grid) for series in raw]
    losses = {
        role: [s.values.ravel() for s, cell in zip(held_out, cells, strict=True) if cell["role"] == role]
        for role in ("reference", "calibration")
    }
    threshold = drawup_threshold(losses["reference"], **{k: v for k, v in settings.items() if k != "consecutive"})
    scored = []
    for cell, one, label in zip(cells, traces, held_out, strict=True):
        loss = label.values.ravel()
        divergence = divergence_step(loss, healthy_losses=losses["reference"], steps=label.positions, **settings)
        done = one.manifest["steps_done" if axis == "steps" else "tokens_done"]
        reached = horizon if one.end_reason != "completed" else min(horizon, done)
        finals = [healthy[: len(loss)] for healthy in losses["calibration"]]
        degraded = divergence is None and is_degraded(loss, finals, settings["ema_span"])
        onset = None if one.onset is None else _position_of_step(one, axis, one.onset)
        scored.append(ScoredRun(cell["role"], cell["fault"], cell["seed"], one, onset, divergence, degraded, reached))
    return Experiment(index, model, axis, tuple(scored), horizon, threshold, mixed)


def _position_of_step(run: Trace, axis: str, step: int) -> int:
    """A step on the axis, exact where some signal has a sample at every step, else linear between samples."""
    if axis == "steps":
        return step
    densest = max(run.signals.values(), key=lambda series: len(series.steps))
    return int(np.interp(step, densest.steps, densest.tokens))
