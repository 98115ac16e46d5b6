"""The paper's figure: signals against step, with alarms and divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from foreshock.analysis.figures.drawing import (
    ALARM,
    FAULTY,
    HEALTHY,
    PLAIN,
    SMOOTHING_SAMPLES,
    drawn_curve,
    label_positions,
    save,
    style,
    value_label,
)
from foreshock.analysis.runs.experiment import HEALTHY_ROLES, Experiment, ScoredRun
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.table import median_step

PANEL_INCHES = 1.95


def central_figure(contest: Contest, path: Path) -> str:
    """The paper's figure: signals against step, healthy band, faulty runs, alarms, divergence. Returns a caption."""
    style()
    experiment = contest.experiment
    panels = experiment.panels
    figure, axes = plt.subplots(len(panels), 1, figsize=(9.5, PANEL_INCHES * len(panels)), sharex=True, squeeze=False)
    for axis, (name, panel) in zip(axes[:, 0], panels.items(), strict=True):
        _healthy_band(axis, experiment, panel)
        detector = contest.detectors.get(name)
        alarms = {} if detector is None else detector.alarms
        for run in experiment.of("faulty"):
            _faulty_run(axis, run, drawn_curve(experiment, run, panel), alarms.get(run.trace.run_id))
        _say_when(axis, experiment, alarms)
        if panel.get("log", False):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(PLAIN)
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel(value_label(experiment, name, panel))
    label_positions(axes[-1, 0], experiment)
    figure.align_ylabels()
    figure.legend(
        handles=_central_legend(len(experiment.of(*HEALTHY_ROLES)), len(experiment.of("faulty"))),
        loc="upper center",
        ncol=5,
        frameon=False,
        bbox_to_anchor=(0.5, 1.0),
        fontsize=10,
        columnspacing=1.2,
        handlelength=1.6,
    )
    figure.subplots_adjust(top=1 - 0.6 / figure.get_size_inches()[1], hspace=0.32)
    save(figure, path)
    return (
        "Lines are single runs: of the worst layer and head where a signal has them, of signals read at every step "
        f"a rolling median over {SMOOTHING_SAMPLES} samples. Alarms at {experiment.alpha:.0%} false alarms per run; "
        "numbers at the right are medians over the faulty runs."
    )


def _healthy_band(axis: plt.Axes, experiment: Experiment, panel: Mapping[str, Any]) -> None:
    """Range and median of the healthy runs."""
    band = pd.concat([drawn_curve(experiment, run, panel) for run in experiment.of(*HEALTHY_ROLES)], axis=1)
    axis.fill_between(band.index, band.min(axis=1), band.max(axis=1), color=HEALTHY, alpha=0.25, linewidth=0)
    axis.plot(band.index, band.median(axis=1), color=HEALTHY, linewidth=1.4)


def _faulty_run(axis: plt.Axes, run: ScoredRun, curve: pd.Series, alarm: int | None) -> None:
    """A run's curve, its alarm and its divergence."""
    axis.plot(curve.index, curve, color=FAULTY, linewidth=1.0, alpha=0.75)
    if alarm is not None:
        axis.plot(
            alarm, curve.asof(alarm), "v", color=ALARM, markersize=9, markeredgecolor="white", zorder=5, clip_on=False
        )
    if run.divergence is not None:
        axis.axvline(run.divergence, color=ALARM, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)


def _say_when(axis: plt.Axes, experiment: Experiment, alarms: Mapping[str, int | None]) -> None:
    """The median alarm above a panel with a detector, the median divergence above another one.

    alarms: by run id; empty where the panel has no detector that is judged.
    """
    where, faulty = "step" if experiment.axis == "steps" else "token", experiment.of("faulty")
    if alarms:
        when = median_step([alarms[run.trace.run_id] for run in faulty])
        said = "median run: no alarm" if np.isnan(when) else f"median alarm: {where} {when:,.0f}"
    elif any(run.divergence is not None for run in faulty):
        when = median_step([run.divergence for run in faulty])
        said = "median run does not diverge" if np.isnan(when) else f"median divergence: {where} {when:,.0f}"
    else:
        return
    axis.set_title(said, loc="right", fontsize=11, color=ALARM, pad=3)


def _central_legend(healthy: int, faulty: int) -> list[Artist]:
    return [
        Patch(color=HEALTHY, alpha=0.25, label=f"{healthy} healthy runs, range"),
        Line2D([], [], color=HEALTHY, label="healthy median"),
        Line2D([], [], color=FAULTY, label=f"{faulty} faulty runs"),
        Line2D([], [], color=ALARM, marker="v", linestyle="", markersize=9, label="first alarm"),
        Line2D([], [], color=ALARM, linestyle=(0, (4, 3)), label="loss diverges"),
    ]
