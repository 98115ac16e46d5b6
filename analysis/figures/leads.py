"""The lead of each detector over divergence, in every faulty run."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from foreshock.analysis.figures.drawing import (
    ALARM,
    HEALTHY,
    THOUSANDS,
    pretty,
    save,
    style,
)
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.outcome import restricted_mean_lead


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
