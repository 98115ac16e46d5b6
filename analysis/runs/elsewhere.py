"""Runs that were trained elsewhere, as cells of seed twins: which failed, by their own loss, and what can be judged.

Nobody has injected anything: a run has failed where its loss rose by so much that harm is done (``Rise``), and it is
not known since when. What leads its rise, from the first step on, leads the failure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.analysis.runs.labels import LABEL_SIGNAL, DrawupLabel, divergence_step
from foreshock.experiments import trace
from foreshock.experiments.trace import ELSEWHERE, Series, Trace

TRAIN_LOSS = "train_loss_raw"
FAILURE = "failure"
"""The fault of a run whose loss rose: its own, nobody has injected it."""

PLANNED = ("learning_rate",)
"""Signals that follow a plan and say nothing of the training."""

MIN_READINGS = 51
"""Of a signal that is judged: a window of 50, and one reading to judge (``detect.own_past``)."""

COVERED = 0.9
"""A signal is judged where its readings reach this share of the run's steps."""


@dataclass(frozen=True)
class Rise:
    """A rise of a loss that is a failure: ``rise_nats`` above its smallest, ``consecutive`` readings long.

    The loss is smoothed by an EMA of span ``ema_span`` readings first; a loss that is not finite is a failure at once.
    No healthy run is known in advance that could widen ``rise_nats``, as the protocol's label does.
    """

    signal: str
    rise_nats: float
    ema_span: int = 1
    consecutive: int = 1

    def step(self, series: Series) -> int | None:
        """The first step of the failure, or None."""
        return divergence_step(
            series.values.ravel(),
            healthy_losses=[np.zeros(1)],
            steps=series.steps,
            label=DrawupLabel(self.ema_span, self.rise_nats, healthy_factor=0.0, consecutive=self.consecutive),
        )


LABELS = (Rise(LABEL_SIGNAL, 0.5), Rise(TRAIN_LOSS, 0.10, ema_span=20, consecutive=5))
"""By preference. Validations lie thousands of steps apart and average many batches: one is enough, unsmoothed. The
training loss is smoothed as the protocol's label on it, over 5 readings, as its label on the held-out loss."""


@dataclass(frozen=True)
class Cell:
    """Seed twins: an experiment of one model whose runs have the role ``test`` (healthy) or ``faulty``.

    label: what tells them apart; left_out: by run id, why a run is not judged.
    """

    experiment: Experiment
    label: Rise
    left_out: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.experiment.model

    @property
    def healthy(self) -> list[ScoredRun]:
        return self.experiment.of("test")

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals that are judged."""
        return tuple(self.experiment.index["experiment"]["detectors"])


def imported_runs(folder: Path) -> list[Trace] | None:
    """The runs of a folder where all of them were trained elsewhere and none has a role; else None.

    Raises TraceError where only some have a role, or some were trained here.
    """
    paths = [path.parent for path in sorted(folder.glob("[!.]*/manifest.json"))]
    said = {path: trace.manifest_of(path).get(ELSEWHERE) for path in paths}
    elsewhere = {path: origin.get("role") for path, origin in said.items() if origin is not None}
    if not elsewhere or all(role is not None for role in elsewhere.values()):
        return None
    ours = next((path for path in paths if path not in elsewhere), None)
    if ours is not None:
        raise trace.TraceError(f"{folder} has runs from elsewhere, and {ours.name} was trained here: score them apart")
    with_role = next((path for path, role in elsewhere.items() if role is not None), None)
    if with_role is not None:
        without = next(path for path, role in elsewhere.items() if role is None)
        raise trace.TraceError(f"run {with_role.name} has a role and {without.name} has none: all runs, or no run")
    return [trace.read(path) for path in paths]


def cells_of(runs: Iterable[Trace], rises: Mapping[str, float] | None = None) -> list[Cell]:
    """Runs by cell, each labelled by its own loss. rises: by loss, another rise in nats than that of ``LABELS``.

    Raises TraceError where a cell has no loss.
    """
    by_cell: dict[str, list[Trace]] = {}
    for run in runs:
        by_cell.setdefault(str(run.manifest[ELSEWHERE]["cell"]), []).append(run)
    return [_cell(name, members, rises or {}) for name, members in by_cell.items()]


def _cell(name: str, runs: Sequence[Trace], rises: Mapping[str, float]) -> Cell:
    label = next((rise for rise in LABELS if all(rise.signal in run.signals for run in runs)), None)
    if label is None:
        lacking = next(run.run_id for run in runs if LABEL_SIGNAL not in run.signals)
        raise trace.TraceError(f"run {lacking} has neither {LABEL_SIGNAL} nor {TRAIN_LOSS}: nothing says if it failed")
    label = replace(label, rise_nats=rises.get(label.signal, label.rise_nats))
    kept = _watched(runs)
    scored, left_out = [], {}
    for run in runs:
        reason = _unjudged(run, kept)
        if reason is not None:
            left_out[run.run_id] = reason
        failed = label.step(run.signals[label.signal])
        role, fault, onset = ("test", None, None) if failed is None else ("faulty", FAILURE, 0)
        seed = int(run.manifest["seed"])
        scored.append(ScoredRun(role, fault, seed, run, onset, failed, False, int(run.manifest["steps_done"])))
    judged = tuple(run for run in scored if run.trace.run_id not in left_out)
    horizon = max(run.horizon for run in scored)
    return Cell(Experiment(_index(name, kept), name, "steps", judged, horizon, label.rise_nats), label, left_out)


def _watched(runs: Sequence[Trace]) -> tuple[str, ...]:
    """The signals of all twins that most of them have enough readings of; all where there is none such."""
    shared = [
        signal
        for signal in runs[0].signals
        if signal != LABEL_SIGNAL and signal not in PLANNED and all(signal in run.signals for run in runs)
    ]
    most = [s for s in shared if 2 * sum(_unjudged(run, (s,)) is None for run in runs) >= len(runs)]
    return tuple(most or shared)


def _index(name: str, signals: Sequence[str]) -> dict[str, Any]:
    """What ``Experiment`` asks of an index."""
    return {
        "experiment": {
            "name": name,
            "title": name,
            "models": [name],
            "align": ["steps"],
            "faults": {FAILURE: {"label": FAILURE}},
            "detectors": {signal: [signal] for signal in signals},
            "baseline": [],
            "figure": {},
        },
        "scale": {"name": ELSEWHERE, "alpha": 0.05},
        "runs": [],
    }


def _unjudged(run: Trace, signals: Sequence[str]) -> str | None:
    """Why a run is not judged, or None."""
    if not signals:
        return "no signal besides the label that all twins have"
    last = int(run.manifest["steps_done"])
    for signal in signals:
        series = run.signals[signal]
        if len(series.steps) < MIN_READINGS:
            return f"{signal} has {len(series.steps)} readings, at least {MIN_READINGS} are needed"
        if series.steps[-1] < COVERED * last:
            return f"{signal} ends at step {series.steps[-1]:,} of {last:,}"
    return None
