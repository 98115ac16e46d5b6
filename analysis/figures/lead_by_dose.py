"""Lead over divergence and alarms against the dose of a fault."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from foreshock.analysis.figures.drawing import THOUSANDS, pretty, save, style
from foreshock.analysis.scores.contest import Contest, run_scores
from foreshock.analysis.scores.lead_by_dose import POSSIBLE, lead_by_dose

MARKERS = "osD^vPXph*<>"
SPREAD = 0.5
"""What part of the distance between two doses the points of all detectors take up, side by side."""


def lead_by_dose_figure(contest: Contest, path: Path) -> str:
    """A line for each detector: its mean lead above, the share of runs in which it alarms below. Returns a caption.

    Doses stand at equal distances, in their order. Small points are single runs.
    """
    style()
    table, experiment = lead_by_dose(contest), contest.experiment.index["experiment"]
    doses = sorted(fault["dose"] for fault in experiment["faults"].values())
    names = [name for name in contest.own if name in set(table["detector"])]
    figure, axes = plt.subplots(
        2,
        1,
        figsize=(4.2 + 1.1 * len(doses), 6.4),
        sharex=True,
        gridspec_kw={"height_ratios": [2.2, 1], "hspace": 0.12},
    )
    colours = sns.color_palette("colorblind", max(len(names), 1))
    _possible(axes[0], table[table["detector"] == POSSIBLE], doses)
    single = _single_leads(contest)
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        offset = SPREAD * ((i + 0.5) / len(names) - 0.5)
        x = np.arange(len(doses)) + offset
        rows = table[table["detector"] == name].set_index("dose").reindex(doses)
        look = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 7, "linewidth": 1.4}
        axes[0].plot(x, rows["lead_steps"], label=pretty(name), zorder=3, **look)
        axes[0].vlines(x, rows["lead_low"], rows["lead_high"], color=colour, linewidth=2, zorder=2)
        axes[1].plot(x, rows["detected"], **look)
        own = single[single["detector"] == name]
        places = [doses.index(dose) + offset for dose in own["dose"]]
        axes[0].scatter(places, own["lead"], color=colour, s=12, alpha=0.45, linewidths=0, zorder=2)
    _axes(axes, experiment["dose"], doses, table)
    height = figure.get_figheight()
    title = f"{experiment['title']}: lead over divergence"
    figure.text(0.02, 0.89 + 0.42 / height, title, fontsize=13, weight="bold")
    said = f"{contest.track.name} track at {contest.alpha:.0%} false alarms per run"
    figure.text(0.02, 0.89 + 0.16 / height, said, fontsize=10, color="0.35")
    figure.legend(loc="center left", bbox_to_anchor=(0.92, 0.55), frameon=False, fontsize=10)
    save(figure, path)
    return (
        f"Mean lead before divergence by {experiment['dose']}, over the runs that diverge (a miss counts 0), with its "
        "95 % interval from 10 seeds on; small points: single runs; grey: from onset to divergence, the most that any "
        "detector could lead. Below: the share of runs with an alarm before divergence, or by the end of a run that "
        "does not diverge."
    )


def _possible(axis: plt.Axes, rows: pd.DataFrame, doses: list[float]) -> None:
    """From onset to divergence, as a step a dose."""
    heights = rows.set_index("dose")["lead_steps"].reindex(doses)
    for i, height in enumerate(heights):
        if np.isfinite(height):
            label = "possible lead" if i == int(np.flatnonzero(np.isfinite(heights))[0]) else None
            axis.bar(i, height, width=0.86, color="0.92", label=label, zorder=0)


def _single_leads(contest: Contest) -> pd.DataFrame:
    """detector, dose and lead of every run that diverges."""
    dose_of = {name: fault["dose"] for name, fault in contest.experiment.index["experiment"]["faults"].items()}
    scores = run_scores(contest.without_singles())
    scores = scores[scores["fault"].isin(list(dose_of)) & scores["lead"].notna()]
    return scores.assign(dose=scores["fault"].map(dose_of))


def _axes(axes: list[plt.Axes], dose: str, doses: list[float], table: pd.DataFrame) -> None:
    of_dose = table.groupby("dose")[["diverged", "runs"]].max().reindex(doses)
    if not of_dose["diverged"].any():
        axes[0].text(0.5, 0.5, "no run diverges", transform=axes[0].transAxes, ha="center", color="0.35")
        axes[0].set_yticks([])
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(THOUSANDS)
    axes[0].set_ylabel("mean lead\n(optimizer steps)")
    axes[1].set_ylabel("alarms\n(share of runs)")
    axes[1].set_ylim(-0.06, 1.06)
    axes[1].set_yticks([0, 0.5, 1], ["0", "½", "1"])
    labels = [f"{dose:g}\n{row.diverged:.0f} of {row.runs:.0f}\ndiverge" for dose, row in of_dose.iterrows()]
    axes[1].set_xticks(range(len(doses)), labels)
    axes[1].set_xlim(-0.5, len(doses) - 0.5)
    axes[1].set_xlabel(dose)
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="0.93", linewidth=0.8)
