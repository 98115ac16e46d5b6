"""The leaderboard in one picture: how early each detector alarms, how surely, and at what false-alarm rate."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from analysis.contest import ALL_FAULTS, Contest, contest, run_scores
from analysis.drawing import ALARM, COLOURS, FAULTY, HEALTHY, THOUSANDS, pretty, save, style
from analysis.experiment import Experiment
from analysis.leaderboard import board

COLOUR_OF_KIND = {
    "detector": HEALTHY,
    "entrant": COLOURS[2],
    "external": COLOURS[2],
    "control": "0.55",
    "oracle": "0.55",
}


def leads_figure(experiment: Experiment, path: Path) -> str:
    """The leaderboard of an experiment on the reference track. Returns a caption."""
    one = contest(experiment, "reference")
    return leaderboard_figure(one, board(one, run_scores(one)), path)


def leaderboard_figure(one: Contest, rows: pd.DataFrame, path: Path) -> str:
    """One model on one track: mean restricted lead under faults that diverge, alarms under others and in healthy runs.

    Rows are ordered by the mean lead over all faults.
    rows: of ``leaderboard.board``. The baseline's name is bold. Returns a caption.
    """
    style()
    labels = {fault: one.experiment.label(fault) for fault in one.experiment.faults}
    known = rows[rows["declined"].isna()]
    overall = known[known["fault"] == ALL_FAULTS].set_index("detector")
    names = overall["rmlt_steps"].fillna(-1.0).sort_values(kind="stable").index.tolist()
    faults = [fault for fault in labels if fault in set(known["fault"])]
    diverging = [f for f in faults if known.loc[known["fault"] == f, "diverged"].max() > 0]
    benign = [f for f in faults if f not in diverging]
    widths = [1.0] * len(diverging) + [0.55] * (len(benign) + 1)
    figure, axes = plt.subplots(
        1,
        len(widths),
        sharey=True,
        squeeze=False,
        figsize=(3.2 + 2.5 * sum(widths), 0.3 * len(names) + 1.7),
        gridspec_kw={"width_ratios": widths, "wspace": 0.09},
    )
    for axis, fault in zip(axes[0], diverging, strict=False):
        of_fault = known[known["fault"] == fault].set_index("detector")
        _leads(axis, of_fault, names)
        diverged, runs = of_fault["diverged"].max(), of_fault["runs"].max()
        axis.set_title(f"{_one_line(labels[fault])}\n{diverged:.0f} of {runs:.0f} diverge", fontsize=11)
    for axis, fault in zip(axes[0][len(diverging) :], benign, strict=False):
        of_fault = known[known["fault"] == fault].set_index("detector")
        _shares(axis, of_fault, names, ("detected", "detected_low", "detected_high"), FAULTY)
        degraded, runs = of_fault["degraded"].max(), of_fault["runs"].max()
        axis.set_title(f"{_one_line(labels[fault])}\nnone diverges,\n{degraded:.0f} of {runs:.0f} degrade", fontsize=11)
        axis.set_xlabel("alarms\n(share of runs)")
    healthy = overall.assign(rate=overall["healthy_alarms"] / overall["healthy_runs"].replace(0, np.nan))
    last = axes[0][-1]
    _shares(last, healthy, names, ("rate", "false_alarm_low", "false_alarm_high"), ALARM)
    last.set_title(f"healthy\n{overall['healthy_runs'].max():.0f} test runs", fontsize=11)
    last.set_xlabel("false alarms\n(share of runs)")
    alpha = overall["alpha"].max()
    if np.isfinite(alpha):
        last.axvline(alpha, color=ALARM, linewidth=1, linestyle=":")
    axes[0][0].set_yticks(range(len(names)), [pretty(name) for name in names], fontsize=9.5)
    axes[0][0].set_ylim(-0.7, len(names) - 0.3)
    for label, name in zip(axes[0][0].get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == one.baseline else "normal")
    declined = rows.loc[rows["declined"].notna(), "detector"]
    height = figure.get_figheight()
    title = f"{one.experiment.index['experiment']['title']}: who feels it first?"
    figure.text(0.01, 0.88 + 1.15 / height, title, fontsize=14, weight="bold")
    said = f"{one.track} track at {one.alpha:.0%} false alarms per run; bold: baseline"
    said += f"; not judged: {', '.join(declined)}" if len(declined) else ""
    figure.text(0.01, 0.88 + 0.9 / height, said, fontsize=10.5, color="0.35")
    save(figure, path)
    return (
        "Mean lead before divergence with its 95 % interval over seeds (a miss counts 0; right is better), alarms "
        "under faults that do not diverge, and false alarms in healthy test runs against the rate aimed at (dotted). "
        "Grey: controls, from one that never alarms to one that knows the onset."
    )


def _one_line(label: str) -> str:
    return " ".join(label.split())


def _leads(axis: plt.Axes, rows: pd.DataFrame, names: list[str]) -> None:
    for y, name in enumerate(names):
        if name not in rows.index or pd.isna(rows.loc[name, "rmlt_steps"]):
            continue
        row = rows.loc[name]
        colour = COLOUR_OF_KIND[row["kind"]]
        axis.barh(y, row["rmlt_steps"], color=colour, alpha=0.28, height=0.66)
        if pd.notna(row["rmlt_low"]):
            axis.plot([row["rmlt_low"], row["rmlt_high"]], [y, y], color=colour, linewidth=2)
        axis.plot(row["rmlt_steps"], y, "o", color=colour, markersize=4.5)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))  # the last label would meet the next panel's first
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.set_xlabel("mean lead\n(optimizer steps)")


def _shares(axis: plt.Axes, rows: pd.DataFrame, names: list[str], columns: tuple[str, str, str], colour) -> None:
    middle, low, high = columns
    for y, name in enumerate(names):
        if name in rows.index and pd.notna(rows.loc[name, middle]):
            row = rows.loc[name]
            axis.plot([row[low], row[high]], [y, y], color=colour, linewidth=1.5, alpha=0.45)
            axis.plot(row[middle], y, "o", color=colour, markersize=4.5)
    axis.set_xlim(-0.05, 1.05)
    axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
