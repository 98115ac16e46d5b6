"""The pictures of lead time: signals against step, lead a detector, lead a fault."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from foreshock.analysis.figures.drawing import (
    ALARM,
    COLOURS,
    FAULTY,
    HEALTHY,
    PLAIN,
    SMOOTHING_SAMPLES,
    THOUSANDS,
    drawn_curve,
    label_positions,
    pretty,
    save,
    style,
    value_label,
)
from foreshock.analysis.runs.experiment import HEALTHY_ROLES, ScoredRun
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.outcome import restricted_mean_lead
from foreshock.analysis.scores.table import median_step

PANEL_INCHES = 1.95


def central_figure(contest: Contest, path: Path) -> str:
    """The paper's figure: signals against step, healthy band, faulty runs, alarms, divergence. Returns a caption."""
    style()
    experiment = contest.experiment
    panels, where = experiment.panels, "step" if experiment.axis == "steps" else "token"
    healthy = experiment.of(*HEALTHY_ROLES)
    faulty = experiment.of("faulty")
    divergences = [run.divergence for run in faulty if run.divergence is not None]
    figure, axes = plt.subplots(len(panels), 1, figsize=(9.5, PANEL_INCHES * len(panels)), sharex=True, squeeze=False)
    for axis, (name, panel) in zip(axes[:, 0], panels.items(), strict=True):
        band = pd.concat([drawn_curve(experiment, run, panel) for run in healthy], axis=1)
        axis.fill_between(band.index, band.min(axis=1), band.max(axis=1), color=HEALTHY, alpha=0.25, linewidth=0)
        axis.plot(band.index, band.median(axis=1), color=HEALTHY, linewidth=1.4)
        detector = contest.detectors.get(name)
        alarms = {} if detector is None else detector.alarms
        for run in faulty:
            curve = drawn_curve(experiment, run, panel)
            axis.plot(curve.index, curve, color=FAULTY, linewidth=1.0, alpha=0.75)
            alarm = alarms.get(run.trace.run_id)
            if alarm is not None:
                marker = {"markersize": 9, "markeredgecolor": "white", "zorder": 5, "clip_on": False}
                axis.plot(alarm, curve.asof(alarm), "v", color=ALARM, **marker)
            if run.divergence is not None:
                axis.axvline(run.divergence, color=ALARM, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)
        if detector is not None and alarms:
            when = median_step([alarms[run.trace.run_id] for run in faulty])
            said = "median run: no alarm" if np.isnan(when) else f"median alarm: {where} {when:,.0f}"
            axis.set_title(said, loc="right", fontsize=11, color=ALARM, pad=3)
        elif divergences:
            when = median_step([run.divergence for run in faulty])
            said = "median run does not diverge" if np.isnan(when) else f"median divergence: {where} {when:,.0f}"
            axis.set_title(said, loc="right", fontsize=11, color=ALARM, pad=3)
        if panel.get("log", False):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(PLAIN)
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel(value_label(experiment, name, panel))
    label_positions(axes[-1, 0], experiment)
    figure.align_ylabels()
    height = figure.get_size_inches()[1]
    handles = [
        Patch(color=HEALTHY, alpha=0.25, label=f"{len(healthy)} healthy runs, range"),
        Line2D([], [], color=HEALTHY, label="healthy median"),
        Line2D([], [], color=FAULTY, label=f"{len(faulty)} faulty runs"),
        Line2D([], [], color=ALARM, marker="v", linestyle="", markersize=9, label="first alarm"),
        Line2D([], [], color=ALARM, linestyle=(0, (4, 3)), label="loss diverges"),
    ]
    figure.legend(
        handles=handles,
        loc="upper center",
        ncol=5,
        frameon=False,
        bbox_to_anchor=(0.5, 1.0),
        fontsize=10,
        columnspacing=1.2,
        handlelength=1.6,
    )
    figure.subplots_adjust(top=1 - 0.6 / height, hspace=0.32)
    save(figure, path)
    return (
        "Lines are single runs: of the worst layer and head where a signal has them, of signals read at every step "
        f"a rolling median over {SMOOTHING_SAMPLES} samples. Alarms at {experiment.alpha:.0%} false alarms per run; "
        "numbers at the right are medians over the faulty runs."
    )


def lead_figure(contest: Contest, path: Path) -> str:
    """Each named detector's alarm in each faulty run, in steps before that run's divergence. Returns a caption."""
    style()
    experiment = contest.experiment
    faulty = [run for run in experiment.of("faulty") if run.divergence is not None]
    names = [n for n in experiment.named_detectors if not contest.detectors[n].declined]
    rows = []
    for name in names:
        for run in faulty:
            alarm = contest.detectors[name].alarms[run.trace.run_id]
            rows.append((name, None if alarm is None or run.divergence is None else run.divergence - alarm))
    mean = {n: restricted_mean_lead([contest.score(contest.detectors[n], run) for run in faulty]) for n in names}
    names.sort(key=mean.__getitem__)
    figure, axis = plt.subplots(figsize=(9.5, 0.52 * len(names) + 1.7))
    known_leads = [lead for _, lead in rows if lead is not None]
    late = max(50.0, *(-lead for lead in known_leads)) if known_leads else 50.0
    never = -late - 0.06 * (max(known_leads, default=0) + late)
    for y, name in enumerate(names):
        leads = [lead for of, lead in rows if of == name]
        colour = HEALTHY if mean[name] > 0 else "0.6"
        axis.barh(y, mean[name], color=colour, alpha=0.3, height=0.62)
        axis.annotate(f"{mean[name]:,.0f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=10)
        for offset, lead in zip(np.linspace(-0.18, 0.18, max(len(leads), 1)), leads, strict=False):
            if lead is None:
                axis.plot(never, y + offset, "x", color="0.45", markersize=6)
            else:
                axis.plot(lead, y + offset, "o", color=colour, markersize=6, markeredgecolor="white")
    axis.annotate("mean", (1.01, len(names) - 0.35), xycoords=("axes fraction", "data"), va="bottom", fontsize=10)
    axis.axvline(0, color=ALARM, linewidth=1.2)
    axis.text(0, len(names) - 0.35, "loss diverges", ha="left", va="bottom", fontsize=10, color=ALARM)
    if any(lead is None for _, lead in rows):
        axis.text(never, -0.75, "never", ha="center", va="center", fontsize=9, color="0.45")
    axis.set_yticks(range(len(names)), [pretty(name) for name in names])
    axis.set_ylim(-0.9, len(names) - 0.3)
    unit = "optimizer steps" if experiment.axis == "steps" else "training tokens"
    axis.set_xlabel(f"lead time: {unit} between first alarm and divergence")
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.set_title(
        f"Who alarms first? {len(faulty)} diverging runs at {experiment.alpha:.0%} false alarms per run",
        loc="left",
        fontsize=13,
        weight="bold",
        pad=18,
    )
    save(figure, path)
    return (
        "Lead time of each detector: dots are runs, a cross is a run without alarm; left of the line the alarm came "
        "after the loss had diverged. Bars and numbers are means, in which a late or missing alarm counts as 0."
    )


def fault_figure(contest: Contest, path: Path) -> str:
    """Each fault's divergence and the named detectors' median alarms, on one step axis. Returns a caption."""
    style()
    experiment = contest.experiment
    shown = [n for n in ("Delta2 entropy", "Delta W entropy", "gradient norm") if n in contest.detectors]
    shown = [n for n in shown if not contest.detectors[n].declined]

    def runs(fault: str) -> list[ScoredRun]:
        return experiment.of("faulty", fault=fault)

    def diverges(fault: str) -> float:
        when = median_step([run.divergence for run in runs(fault)])
        return experiment.horizon * 1.5 if np.isnan(when) else when

    def alarm(fault: str, name: str) -> float:
        return median_step([contest.detectors[name].alarms[run.trace.run_id] for run in runs(fault)])

    faults = sorted(
        experiment.faults,
        key=lambda f: (diverges(f), *(np.nan_to_num(alarm(f, n), nan=9e9) for n in shown)),
        reverse=True,
    )
    figure, axis = plt.subplots(figsize=(9.5, 0.42 * len(faults) + 1.9))
    markers = dict(zip(shown, "vos", strict=False))
    for y, fault in enumerate(faults):
        end = diverges(fault)
        axis.hlines(y, 0, min(end, experiment.horizon), color="0.85", linewidth=5)
        if end <= experiment.horizon:
            axis.plot(end, y, "|", color=ALARM, markersize=17, markeredgewidth=3)
        else:
            count = sum(run.divergence is not None for run in runs(fault))
            said = "no divergence" if not count else f"{count} of {len(runs(fault))} diverge"
            degraded = sum(run.degraded for run in runs(fault))
            axis.text(
                experiment.horizon * 1.01,
                y,
                said + (f", {degraded} degraded" if degraded else ""),
                va="center",
                fontsize=9,
                color="0.35",
            )
        for name, colour in zip(shown, (COLOURS[3], COLOURS[0], COLOURS[2]), strict=False):
            when = alarm(fault, name)
            if not np.isnan(when):
                aside = 0.17 * (1 - shown.index(name))  # equal steps stay visible side by side
                axis.plot(when, y + aside, markers[name], color=colour, markersize=9, markeredgecolor="white", zorder=4)
    axis.set_yticks(range(len(faults)), [experiment.label(fault) for fault in faults])
    axis.set_ylabel("corrupted tensor" if experiment.index["experiment"]["name"] == "fault_sites" else "fault")
    label_positions(axis, experiment)
    axis.set_xlim(0, experiment.horizon * 1.02)
    handles = [
        Line2D([], [], color=c, marker=markers[n], linestyle="", markersize=9, label=f"{pretty(n)} alarms")
        for n, c in zip(shown, (COLOURS[3], COLOURS[0], COLOURS[2]), strict=False)
    ]
    handles.append(
        Line2D([], [], color=ALARM, marker="|", linestyle="", markersize=14, markeredgewidth=3, label="loss diverges")
    )
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncol=4, frameon=False, fontsize=10)
    save(figure, path)
    return (
        f"Median over {len(runs(faults[0]))} runs of first alarm and divergence, horizon {experiment.horizon:,} "
        f"{experiment.axis}, {experiment.alpha:.0%} false alarms per run."
    )
