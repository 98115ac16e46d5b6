"""Where the fault was and where the broken laws say it is, as a confusion matrix."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from foreshock.analysis.figures.drawing import save, style
from foreshock.analysis.locate.fault_truth import HEALTHY, OTHER
from foreshock.analysis.locate.laws import ATTENTION
from foreshock.analysis.locate.localise import confusion, localise
from foreshock.analysis.locate.naming import NO_ALARM
from foreshock.analysis.runs.experiment import Experiment

SYMBOLS = {"delta": "δ", "dp": "dP", "ds": "dS", "do": "dO", "dv": "dV", "dq": "dQ", "dk": "dK"}


def _said(name: str) -> str:
    """A class of sites with their symbols; a name in words stays."""
    if name not in ATTENTION:
        return name
    return ", ".join(SYMBOLS.get(site, site if site == "lse" else site.upper()) for site in name.split())


def localise_figure(experiment: Experiment, path: Path) -> str:
    """Counts of runs: rows where the fault was, columns where it was named. Returns a caption."""
    style()
    localisation = localise(experiment)
    counts = confusion(localisation.table)
    shares = counts.div(counts.sum(axis=1), axis=0)
    figure, axis = plt.subplots(figsize=(1.05 * len(counts.columns) + 3.6, 0.55 * len(counts) + 1.9))
    text = counts.astype(str).where(counts > 0, "")
    sns.heatmap(
        shares, ax=axis, vmin=0, vmax=1, cmap="Blues", annot=text, fmt="", linewidths=1.2, linecolor="0.85",
        cbar_kws={"label": "share of the row's runs", "shrink": 0.8, "aspect": 14}, annot_kws={"fontsize": 11},
    )  # fmt: skip
    axis.set_xticklabels([textwrap.fill(_said(name), 8) for name in counts.columns], rotation=0, fontsize=10)
    axis.set_yticklabels(
        [f"{_said(name)}  (n={n})" for name, n in counts.sum(axis=1).items()], rotation=0, fontsize=10.5
    )
    for row, name in enumerate(counts.index):  # where a right verdict stands
        right = name if name in counts.columns else NO_ALARM
        column = list(counts.columns).index(right)
        axis.add_patch(
            plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="#d55e00", linewidth=2.2, clip_on=False)
        )
    axis.set_xlabel("named by the broken laws")
    axis.set_ylabel("where the fault is")
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.tick_params(length=0)
    sound = localisation.table["true_class"].isin((HEALTHY, OTHER))
    right, runs = _right(localisation.table[~sound])
    axis.set_title(
        f"Broken laws name the site's class in {right} of {runs} runs with a broken kernel",
        fontsize=13, weight="bold", pad=14, loc="left", x=-0.3,
    )  # fmt: skip
    save(figure, path)
    return (
        "Runs by the class of sites where the fault is (row) and where the "
        "broken conservation laws say that it is (column); framed: right. Sites of one class break the same laws. "
        f"Threshold: one for all laws, layers and heads, at {experiment.alpha:.0%} false alarms per run."
    )


def _right(runs: pd.DataFrame) -> tuple[int, int]:
    known = runs["class_right"].dropna()
    return int(known.sum()), len(known)
