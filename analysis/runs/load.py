"""Reading an experiment: its index, its runs' traces, and the label of each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foreshock.analysis.runs import reduced
from foreshock.analysis.runs.align import AXES, hold, positions
from foreshock.analysis.runs.checks import check_alike, check_cells, check_roles, differences
from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.analysis.runs.index import read_index
from foreshock.analysis.runs.labels import (
    LABEL_SIGNAL,
    DrawupLabel,
    clean_label,
    divergence_step,
    drawup_threshold,
    is_degraded,
)
from foreshock.analysis.runs.outcomes import Outcome, outcome
from foreshock.experiments import trace
from foreshock.experiments.names import check_index_names
from foreshock.experiments.trace import Trace
from foreshock.faults.card import BENIGN


def views(report: Path) -> list[tuple[str, str]]:
    """The (model, axis) pairs that an experiment is scored under, from its index."""
    index = read_index(report)
    return [(model, axis) for model in index["experiment"]["models"] for axis in index["experiment"]["align"]]


def has_cases(report: Path) -> bool:
    """Whether an experiment's runs are judged each by itself, not against healthy ones beside them."""
    return "cases" in read_index(report)["experiment"]


def read_runs(folder: Path, run_ids: Sequence[str]) -> list[Trace]:
    """Finished runs by id, from run folders or from a reduced folder. Raises TraceError where one is missing."""
    if not reduced.is_reduced(folder):
        return [trace.read(folder / run_id) for run_id in run_ids]
    known = reduced.read(folder)
    missing = [run_id for run_id in run_ids if run_id not in known]
    if missing:
        raise trace.TraceError(f"{folder} has no run {missing[0]}")
    return [known[run_id] for run_id in run_ids]


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
    check_roles(cells)
    try:
        traces = read_runs(runs, [cell["run_id"] for cell in cells])
        unlabelled = next((run.run_id for run in traces if LABEL_SIGNAL not in run.signals), None)
    except trace.TraceError as error:
        trained_here = "command" in index and not reduced.is_reduced(runs)
        raise trace.TraceError(f"{error}: {index['command']}" if trained_here else error) from None
    mixed = differences(traces)
    if mixed and not allow_mixed:
        raise trace.TraceError(
            f"the runs in {runs} differ in {'; '.join(mixed)}: train them again together, or pass allow_mixed=true"
        )
    check_cells(cells, traces)
    check_alike(traces)
    rule = DrawupLabel(**index["label"])
    if unlabelled:
        raise trace.TraceError(f"run {unlabelled} has no {LABEL_SIGNAL}, which tells whether it diverged")
    raw = [clean_label(t) for t in traces]
    healthy = [i for i, cell in enumerate(cells) if cell["fault"] is None]
    longest = max(healthy, key=lambda i: len(raw[i].steps))  # a healthy run that broke off must not cut the others
    grid = positions(raw[longest], axis)
    horizon = traces[longest].horizon if axis == "steps" else traces[longest].manifest["tokens_done"]
    held_out = [hold(series, axis, grid) for series in raw]
    losses = {
        role: [s.values.ravel() for s, cell in zip(held_out, cells, strict=True) if cell["role"] == role]
        for role in ("reference", "calibration")
    }
    threshold = drawup_threshold(losses["reference"], rule)
    scored = []
    for cell, run, label in zip(cells, traces, held_out, strict=True):
        loss, role = label.values.ravel(), _role(cell, run)
        divergence = divergence_step(
            loss,
            healthy_losses=losses["reference"],
            steps=label.positions,
            label=rule,
            stopped=run.end_reason == "diverged",
        )
        done = run.manifest["steps_done" if axis == "steps" else "tokens_done"]
        reached = horizon if run.end_reason != "completed" else min(horizon, done)
        finals = [healthy[: len(loss)] for healthy in losses["calibration"]]
        degraded = divergence is None and is_degraded(loss, finals, rule.ema_span)
        onset = None if run.onset is None else _position_of_step(run, axis, run.onset)
        own = hold(run.signals[LABEL_SIGNAL], axis, grid).values.ravel()
        judged = role not in losses
        result = _outcome(loss, own, losses, rule, run.end_reason) if judged else None
        scored.append(ScoredRun(role, cell["fault"], cell["seed"], run, onset, divergence, degraded, reached, result))
    if not any(run.role == "faulty" for run in scored):
        raise ValueError("experiment.faults: all of them are benign controls; scoring needs at least one fault")
    return Experiment(index, model, axis, tuple(scored), horizon, threshold, mixed)


def _role(cell: Mapping[str, Any], run: Trace) -> str:
    """That of the index, but for a planned change that is no fault."""
    benign = cell["fault"] is not None and run.manifest.get("injection", {}).get("family") == BENIGN
    return BENIGN if benign else cell["role"]


def _outcome(
    clean: np.ndarray, own: np.ndarray, healthy: Mapping[str, Sequence[np.ndarray]], rule: DrawupLabel, end_reason: str
) -> Outcome:
    """Of one run, against the calibration runs; the reference runs set Delta."""
    return outcome(
        clean,
        healthy["calibration"],
        own=own,
        reference=healthy["reference"],
        label=rule,
        stopped=end_reason == "diverged",
        broken=end_reason == "non_finite",
    )


def _position_of_step(run: Trace, axis: str, step: int) -> int:
    """A step on the axis, exact where some signal has a sample at every step, else linear between samples."""
    if axis == "steps":
        return step
    densest = max(run.signals.values(), key=lambda series: len(series.steps))
    return int(np.interp(step, densest.steps, densest.tokens))
