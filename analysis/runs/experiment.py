"""The runs of one experiment of one model, labelled and on one axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from foreshock.analysis.runs.labels import CLEAN_SIGNAL, LABEL_SIGNAL
from foreshock.analysis.runs.outcomes import Outcome
from foreshock.experiments.trace import Series, Trace, TraceError
from foreshock.faults.card import BENIGN
from foreshock.monitors.signal import Signal

HEALTHY = "healthy"
"""What tables call a run without a fault."""
HEALTHY_ROLES = ("reference", "calibration", "test")


@dataclass(frozen=True)
class ScoredRun:
    """A run with its role, fault name (None = healthy) and label, on the axis of its experiment.

    role: of ``HEALTHY_ROLES``, ``faulty``, or ``faults.card.BENIGN``, of a planned change that is no fault; onset,
    divergence: positions, or None; horizon: where its scoring ends, the experiment's or its own end; outcome: what
    became of it against the calibration runs, None of those and of reference runs.
    """

    role: str
    fault: str | None
    seed: int
    trace: Trace
    onset: int | None
    divergence: int | None
    degraded: bool
    horizon: int
    outcome: Outcome | None = None

    def signal(self, name: str) -> Series:
        """One signal of the run; empty where the run ended before its first sample. Raises TraceError if unknown."""
        if name in self.trace.signals:
            return self.trace.signals[name]
        if name in self.trace.manifest["signals"]:
            return Series(np.empty(0, int), np.empty(0, int), np.empty((0, 1, 1)), np.empty((0, 1, 1), bool))
        raise TraceError(f"run {self.trace.run_id} has no signal {name!r}: it was trained without its monitor")


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
    def smallest_alpha(self) -> float:
        """1 / (n + 1) of n calibration runs: the rate at which the largest of them all is the threshold."""
        return 1 / (len(self.of("calibration")) + 1)

    @property
    def score_every(self) -> int:
        """Detectors see the readings of so many steps' cadence (``Cadence.thinned``); 1 unless the experiment says."""
        return self.index["experiment"].get("score_every", 1)

    @property
    def faults(self) -> list[str]:
        """Without benign controls."""
        return [name for name in self.index["experiment"]["faults"] if name not in self.benign_controls]

    @cached_property
    def benign_controls(self) -> list[str]:
        return list(dict.fromkeys(str(run.fault) for run in self.of(BENIGN)))

    def label(self, fault: str | None) -> str:
        """A fault's name for people."""
        return "healthy" if fault is None else self.index["experiment"]["faults"][fault].get("label", fault)

    def of(self, *roles: str, fault: str | None = None) -> list[ScoredRun]:
        return [run for run in self.runs if run.role in roles and (fault is None or run.fault == fault)]

    @cached_property
    def signals(self) -> Mapping[str, Signal]:
        """What each signal of these runs is, by name."""
        return self.runs[0].trace.described

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
        """Every signal but the labels, as a detector by itself."""
        return {name: (name,) for name in sorted(self.signals) if name not in (LABEL_SIGNAL, CLEAN_SIGNAL)}
