"""The runs of one experiment as the report sees them, and every detector's alarm in each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from analysis import reduced
from analysis.alarms import make_rule
from analysis.align import AXES, hold, positions
from analysis.detection import Detection, Detector
from analysis.index import read_index
from analysis.labels import divergence_step, drawup_threshold, is_degraded
from analysis.score import Score, score
from experiments import trace
from experiments.names import check_index_names
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
    def score_every(self) -> int:
        """Detectors see samples at multiples of so many steps; 1 unless the experiment says otherwise."""
        return self.index["experiment"].get("score_every", 1)

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
    def baselines(self) -> tuple[str, ...]:
        """The named detectors that others are read against, without those that this model does not have.

        Raises ValueError where the index names one that is no detector, or none that these runs have.
        """
        given, detectors = self.index["experiment"]["baseline"], self.index["experiment"]["detectors"]
        names = (given,) if isinstance(given, str) else tuple(given)
        unknown = [name for name in names if name not in detectors]
        if unknown:
            raise ValueError(f"experiment.baseline={unknown[0]!r} is not allowed: of {', '.join(detectors)}")
        recorded = tuple(name for name in names if name in self.named_detectors)
        if not recorded:
            raise ValueError(f"experiment.baseline={', '.join(names)}: no run of {self.model} has their signals")
        return recorded

    @cached_property
    def fault_families(self) -> dict[str, str]:
        """By fault its family: the class of what was injected, which its runs' configurations name."""
        designs = {run.fault: run.trace.manifest["config"].get("fault") or {} for run in self.of("faulty")}
        return {fault: str(designs.get(fault, {}).get("_target_", fault)) for fault in self.faults}

    @cached_property
    def panels(self) -> dict[str, Mapping[str, Any]]:
        """The figure's panels, without those whose signals this model does not have."""
        panels = self.index["experiment"]["figure"]
        return {name: panel for name, panel in panels.items() if set(panel["signals"]) <= set(self.signals)}

    @cached_property
    def single_signals(self) -> dict[str, tuple[str, ...]]:
        """Every signal but the label's, as a detector by itself."""
        return {name: (name,) for name in sorted(self.signals) if name != LABEL_SIGNAL}

    @cached_property
    def detectors(self) -> dict[str, Detector]:
        """The experiment's named detectors, then every signal by itself, each calibrated on its own."""
        detection, rule = Detection(self), make_rule(**self.index["rule"])
        return {
            name: detection.detect(name, signals, rule, self.alpha)
            for name, signals in (self.named_detectors | self.single_signals).items()
        }

    def score(self, detector: Detector, run: ScoredRun) -> Score:
        return score(
            alarm=detector.alarms[run.trace.run_id], onset=run.onset, divergence=run.divergence, horizon=self.horizon
        )


def views(report: Path) -> list[tuple[str, str]]:
    """The (model, axis) pairs that an experiment is scored under, from its index."""
    index = read_index(report)
    return [(model, axis) for model in index["experiment"]["models"] for axis in index["experiment"]["align"]]


def has_cases(report: Path) -> bool:
    """Whether an experiment's runs are judged each by itself, not against healthy ones beside them."""
    return "cases" in read_index(report)["experiment"]


def _check_roles(cells: Sequence[Mapping[str, Any]]) -> None:
    for role in ("calibration", "faulty"):
        if not any(cell["role"] == role for cell in cells):
            raise ValueError(f"scale.seeds.{role}=0: scoring needs at least one {role} run")
    healthy_seeds = [cell["seed"] for cell in cells if cell["fault"] is None]
    if len(set(healthy_seeds)) != len(healthy_seeds):
        raise ValueError("a healthy seed serves two roles: reference, calibration and test must be disjoint")
    both = sorted(set(healthy_seeds) & {cell["seed"] for cell in cells if cell["role"] == "faulty"})
    if both:
        raise ValueError(f"seed {both[0]} is healthy and faulty: a faulty run must not share what set its threshold")
    ids = [cell["run_id"] for cell in cells]
    twice = next((run_id for run_id in ids if ids.count(run_id) > 1), None)
    if twice:
        raise ValueError(f"run {twice} is listed twice: every run has one role")


FAULTY_ALONE = ("fault.", "seed", "train.steps", "train.stop_drawup_nats")
"""Keys of a configuration in which a faulty run may differ from the healthy ones."""


def _check_cells(cells: Sequence[Mapping[str, Any]], traces: Sequence[Trace]) -> None:
    """Raises TraceError where a run is not what the index says: another seed, healthy or not, another fault."""
    designs: dict[str, tuple[str, Any]] = {}
    for cell, one in zip(cells, traces, strict=True):
        if one.manifest.get("seed", cell["seed"]) != cell["seed"]:
            raise trace.TraceError(f"run {one.run_id} has seed {one.manifest['seed']}, the index says {cell['seed']}")
        if (one.onset is None) != (cell["fault"] is None):
            said = "is healthy" if one.onset is None else "has a fault"
            raise trace.TraceError(f"run {one.run_id} {said}, the index says {cell['fault'] or 'healthy'}")
        if cell["fault"] is not None:
            first, design = designs.setdefault(cell["fault"], (one.run_id, one.manifest["config"].get("fault")))
            if one.manifest["config"].get("fault") != design:
                raise trace.TraceError(
                    f"runs {first} and {one.run_id} of fault {cell['fault']!r} have different faults"
                )


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {path: node}
    return {key: v for name, child in node.items() for key, v in _flat(child, f"{path}.{name}".lstrip(".")).items()}


def check_alike(traces: Sequence[Trace]) -> None:
    """Healthy runs set one threshold together: all but the seed is one configuration; a faulty one adds its fault.

    Raises TraceError that names the key, both values and runs.
    """
    configs = [_flat(one.manifest["config"]) for one in traces]
    healthy = next(config for config, one in zip(configs, traces, strict=True) if one.onset is None)
    first = next(one.run_id for one in traces if one.onset is None)
    for config, one in zip(configs, traces, strict=True):
        free = ("seed",) if one.onset is None else FAULTY_ALONE
        for key in dict.fromkeys((*healthy, *config)):
            if config.get(key) != healthy.get(key) and not key.startswith(free):
                what = "healthy runs of one calibration" if one.onset is None else "a faulty run and its healthy ones"
                raise trace.TraceError(
                    f"{what} differ in {key}: {json.dumps(healthy.get(key))} in {first}, "
                    f"{json.dumps(config.get(key))} in {one.run_id}; score them apart"
                )


def read_runs(folder: Path, run_ids: Sequence[str]) -> list[Trace]:
    """Finished runs by id, from run folders or from a reduced folder. Raises TraceError where one is missing."""
    if not reduced.is_reduced(folder):
        return [trace.read(folder / run_id) for run_id in run_ids]
    known = reduced.read(folder)
    missing = [run_id for run_id in run_ids if run_id not in known]
    if missing:
        raise trace.TraceError(f"{folder} has no run {missing[0]}")
    return [known[run_id] for run_id in run_ids]


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
    unfinished, damaged, mixed, or healthy ones differ in more than the seed; ValueError where a role has no run, seeds
    of two roles overlap, or the view does not exist.
    """
    return label_runs(read_index(report), runs, allow_mixed, model, axis)


def label_runs(
    index: Mapping[str, Any], runs: Path, allow_mixed: bool = False, model: str | None = None, axis: str | None = None
) -> Experiment:
    """The runs that an index lists, read from ``runs`` and labelled: ``load`` for an index that is no file."""
    check_index_names(index)
    model = index["experiment"]["models"][0] if model is None else model
    axis = index["experiment"]["align"][0] if axis is None else axis
    if axis not in AXES:
        raise ValueError(f"align={axis!r} is not allowed: one of {', '.join(AXES)}")
    cells = [cell for cell in index["runs"] if cell["model"] == model]
    _check_roles(cells)
    try:
        traces = read_runs(runs, [cell["run_id"] for cell in cells])
        unlabelled = next((one.run_id for one in traces if LABEL_SIGNAL not in one.signals), None)
    except trace.TraceError as error:
        trained_here = "command" in index and not reduced.is_reduced(runs)
        raise trace.TraceError(f"{error}: {index['command']}" if trained_here else error) from None
    mixed = _differences(traces)
    if mixed and not allow_mixed:
        raise trace.TraceError(
            f"the runs in {runs} differ in {'; '.join(mixed)}: train them again together, or pass allow_mixed=true"
        )
    _check_cells(cells, traces)
    check_alike(traces)
    settings = index["label"]
    if unlabelled:
        raise trace.TraceError(f"run {unlabelled} has no {LABEL_SIGNAL}, which tells whether it diverged")
    raw = [t.signals[LABEL_SIGNAL] for t in traces]
    healthy = [i for i, cell in enumerate(cells) if cell["fault"] is None]
    longest = max(healthy, key=lambda i: len(raw[i].steps))  # a healthy run that broke off must not cut the others
    grid = positions(raw[longest], axis)
    horizon = traces[longest].horizon if axis == "steps" else traces[longest].manifest["tokens_done"]
    held_out = [hold(series, axis, grid) for series in raw]
    losses = {
        role: [s.values.ravel() for s, cell in zip(held_out, cells, strict=True) if cell["role"] == role]
        for role in ("reference", "calibration")
    }
    threshold = drawup_threshold(losses["reference"], **{k: v for k, v in settings.items() if k != "consecutive"})
    scored = []
    for cell, one, label in zip(cells, traces, held_out, strict=True):
        loss = label.values.ravel()
        divergence = divergence_step(
            loss,
            healthy_losses=losses["reference"],
            steps=label.positions,
            stopped=one.end_reason == "diverged",
            **settings,
        )
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
