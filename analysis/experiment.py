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
from analysis.labels import divergence_step, drawup_threshold, is_degraded
from analysis.score import Score, score
from experiments import trace
from experiments.trace import Series, Trace

LABEL_SIGNAL = "held_out_loss"


@dataclass(frozen=True)
class ScoredRun:
    """A run with its role, fault name (None = healthy) and label."""

    role: str
    fault: str | None
    seed: int
    trace: Trace
    divergence: int | None
    degraded: bool

    def signal(self, name: str) -> Series:
        """One signal of the run; empty where the run ended before its first sample. Raises TraceError if unknown."""
        if name in self.trace.signals:
            return self.trace.signals[name]
        if name in self.trace.manifest["signals"]:
            return Series(np.empty(0, int), np.empty((0, 1, 1)), np.empty((0, 1, 1), bool))
        raise trace.TraceError(f"run {self.trace.run_id} has no signal {name!r}: it was trained without its monitor")


@dataclass(frozen=True)
class Detector:
    """Some signals that share one threshold: an alarm is raised when any of their charts is above it.

    declined: why the reference track cannot judge it, or None.
    """

    name: str
    signals: tuple[str, ...]
    threshold: float = float("nan")
    alarms: Mapping[str, int | None] = field(default_factory=dict)
    declined: str | None = None


@dataclass(frozen=True)
class Experiment:
    """An experiment's saved runs. ``index`` is the content of its ``experiment.json``."""

    index: Mapping[str, Any]
    runs: tuple[ScoredRun, ...]
    drawup_threshold_nats: float
    mixed: tuple[str, ...] = ()

    @property
    def horizon(self) -> int:
        return self.runs[0].trace.horizon

    @property
    def alpha(self) -> float:
        return self.index["scale"]["alpha"]

    @property
    def faults(self) -> list[str]:
        return list(self.index["experiment"]["faults"])

    def of(self, *roles: str, fault: str | None = None) -> list[ScoredRun]:
        return [run for run in self.runs if run.role in roles and (fault is None or run.fault == fault)]

    @cached_property
    def detectors(self) -> dict[str, Detector]:
        """The experiment's named detectors, then every signal by itself, each calibrated on its own."""
        named = {name: tuple(signals) for name, signals in self.index["experiment"]["detectors"].items()}
        known = self.runs[0].trace.manifest["signals"]
        alone = {name: (name,) for name in sorted(known) if name != LABEL_SIGNAL}
        statistics = {
            name: self._statistics(name) for name in sorted({s for d in named.values() for s in d} | set(alone))
        }
        return {name: self._detector(name, signals, statistics) for name, signals in (named | alone).items()}

    def _statistics(self, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]] | DeclinedSignal:
        """run id -> (steps, chart statistic) of one signal, on the reference track."""
        if not any(name in run.trace.signals for run in self.runs):
            return DeclinedSignal(f"{name}: no sample in {self.horizon} steps")
        try:
            band = Band.fit(name, [run.signal(name) for run in self.of("reference")])
        except DeclinedSignal as reason:
            return reason
        rule = make_rule(**self.index["rule"])
        bad = self.runs[0].trace.manifest["signals"][name]["bad"]
        return {
            run.trace.run_id: (run.signal(name).steps, chart_statistic(band.z(run.signal(name)), bad, rule))
            for run in self.of("calibration", "test", "faulty")
        }

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
            found = [
                first_alarm(statistics[s][run.trace.run_id][1], statistics[s][run.trace.run_id][0], threshold)
                for s in signals
            ]
            alarms[run.trace.run_id] = min((alarm for alarm in found if alarm is not None), default=None)
        return Detector(name, tuple(signals), threshold, alarms)

    def score(self, detector: Detector, run: ScoredRun) -> Score:
        return score(
            alarm=detector.alarms[run.trace.run_id],
            onset=run.trace.onset,
            divergence=run.divergence,
            horizon=self.horizon,
        )


def load(report: Path, runs: Path, allow_mixed: bool = False) -> Experiment:
    """Read an experiment's index from ``report`` and its traces from ``runs``, and label every run.

    Runs made by different sources, data or torch versions are refused unless ``allow_mixed``, and then named.
    Raises TraceError where runs are missing, unfinished, damaged, mixed or at different horizons,
    ValueError where a role has no run or seeds of two roles overlap.
    """
    index_file = report / "experiment.json"
    if not index_file.exists():
        raise trace.TraceError(f"{index_file} does not exist: run experiments.reproduce first")
    index = json.loads(index_file.read_text())
    cells = index["runs"]
    for role in ("calibration", "faulty"):
        if not any(cell["role"] == role for cell in cells):
            raise ValueError(f"scale.seeds.{role}=0: scoring needs at least one {role} run")
    healthy_seeds = [cell["seed"] for cell in cells if cell["fault"] is None]
    if len(set(healthy_seeds)) != len(healthy_seeds):
        raise ValueError("a healthy seed serves two roles: reference, calibration and test must be disjoint")
    traces = [trace.read(runs / cell["run_id"]) for cell in cells]
    mixed: list[str] = []
    for what in ("source_sha256", "data_sha256", "torch"):
        found = sorted({t.manifest[what] for t in traces})
        if len(found) > 1:
            mixed.append(f"{what} {', '.join(value[:12] for value in found)}")
    if mixed and not allow_mixed:
        raise trace.TraceError(
            f"the runs in {runs} differ in {'; '.join(mixed)}: train them again together, or pass allow_mixed=true"
        )
    if len({t.horizon for t in traces}) > 1:
        raise trace.TraceError(f"the runs in {runs} have different horizons: {sorted({t.horizon for t in traces})}")

    settings = index["label"]
    held_out = [t.signals[LABEL_SIGNAL] for t in traces]
    losses = {
        role: [s.values.ravel() for s, cell in zip(held_out, cells, strict=True) if cell["role"] == role]
        for role in ("reference", "calibration")
    }
    threshold = drawup_threshold(losses["reference"], **{k: v for k, v in settings.items() if k != "consecutive"})
    scored = []
    for cell, one, label in zip(cells, traces, held_out, strict=True):
        loss = label.values.ravel()
        divergence = divergence_step(loss, healthy_losses=losses["reference"], steps=label.steps, **settings)
        degraded = divergence is None and is_degraded(loss, losses["calibration"], settings["ema_span"])
        scored.append(ScoredRun(cell["role"], cell["fault"], cell["seed"], one, divergence, degraded))
    return Experiment(index, tuple(scored), threshold, tuple(mixed))
