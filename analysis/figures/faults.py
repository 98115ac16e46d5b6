"""Several faults on one step axis: first alarms and divergence of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from foreshock.analysis.figures.drawing import (
    ALARM,
    COLOURS,
    label_positions,
    pretty,
    save,
    style,
)
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.table import median_step

ALARMS_OF_FAULTS = ("Delta2 entropy", "Delta W entropy", "gradient norm")
"""The detectors whose alarms ``fault_figure`` shows."""
LOOKS = (("v", COLOURS[3]), ("o", COLOURS[0]), ("s", COLOURS[2]))
"""Marker and colour of the first of them, the second and the third."""


def fault_figure(contest: Contest, path: Path) -> str:
    """Each fault's divergence and the named detectors' median alarms, on one step axis. Returns a caption."""
    style()
    experiment = contest.experiment
    shown = [n for n in ALARMS_OF_FAULTS if n in contest.detectors and not contest.detectors[n].declined]
    looks = dict(zip(shown, LOOKS, strict=False))
    faults = _latest_first(contest, shown)
    figure, axis = plt.subplots(figsize=(9.5, 0.42 * len(faults) + 1.9))
    for y, fault in enumerate(faults):
        _divergence_row(axis, experiment, fault, y)
        for i, (name, (marker, colour)) in enumerate(looks.items()):
            when = _median_alarm(contest, fault, name)
            if not np.isnan(when):
                aside = 0.17 * (1 - i)  # equal steps stay visible side by side
                axis.plot(when, y + aside, marker, color=colour, markersize=9, markeredgecolor="white", zorder=4)
    axis.set_yticks(range(len(faults)), [experiment.label(fault) for fault in faults])
    axis.set_ylabel("corrupted tensor" if experiment.index["experiment"]["name"] == "fault_sites" else "fault")
    label_positions(axis, experiment)
    axis.set_xlim(0, experiment.horizon * 1.02)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=9, label=f"{pretty(name)} alarms")
        for name, (marker, colour) in looks.items()
    ]
    handles.append(
        Line2D([], [], color=ALARM, marker="|", linestyle="", markersize=14, markeredgewidth=3, label="loss diverges")
    )
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncol=4, frameon=False, fontsize=10)
    save(figure, path)
    return (
        f"Median over {len(experiment.of('faulty', fault=faults[0]))} runs of first alarm and divergence, horizon "
        f"{experiment.horizon:,} {experiment.axis}, {experiment.alpha:.0%} false alarms per run."
    )


def _latest_first(contest: Contest, shown: Sequence[str]) -> list[str]:
    """The faults by their median divergence, where it is the same by the median alarms of these detectors."""

    def key(fault: str) -> tuple[float, ...]:
        alarms = (np.nan_to_num(_median_alarm(contest, fault, name), nan=9e9) for name in shown)
        return _median_divergence(contest.experiment, fault), *map(float, alarms)

    return sorted(contest.experiment.faults, key=key, reverse=True)


def _median_divergence(experiment: Experiment, fault: str) -> float:
    """Beyond the horizon where the median run does not diverge."""
    when = median_step([run.divergence for run in experiment.of("faulty", fault=fault)])
    return experiment.horizon * 1.5 if np.isnan(when) else when


def _median_alarm(contest: Contest, fault: str, name: str) -> float:
    """NaN where the median run has none."""
    alarms = contest.detectors[name].alarms
    return median_step([alarms[run.trace.run_id] for run in contest.experiment.of("faulty", fault=fault)])


def _divergence_row(axis: plt.Axes, experiment: Experiment, fault: str, y: float) -> None:
    """How far a fault's runs train, and a mark where the median one diverges or a word that it does not."""
    runs, end = experiment.of("faulty", fault=fault), _median_divergence(experiment, fault)
    axis.hlines(y, 0, min(end, experiment.horizon), color="0.85", linewidth=5)
    if end <= experiment.horizon:
        axis.plot(end, y, "|", color=ALARM, markersize=17, markeredgewidth=3)
        return
    count, degraded = sum(run.divergence is not None for run in runs), sum(run.degraded for run in runs)
    said = "no divergence" if not count else f"{count} of {len(runs)} diverge"
    said += f", {degraded} degraded" if degraded else ""
    axis.text(experiment.horizon * 1.01, y, said, va="center", fontsize=9, color="0.35")
