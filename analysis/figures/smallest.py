"""How small a fault a detector still detects, as a table in colour: bits against the share of elements hit."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm

from foreshock.analysis.figures.drawing import save, style
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.delays import smallest_table

NEVER = "–"


def smallest_figure(contest: Contest, path: Path) -> str:
    """The family's median delay by bits and share of elements, one panel for each choice of heads. Returns a caption.

    Raises ValueError where the experiment's ``family`` has no fault of known size.
    """
    style()
    experiment = contest.experiment
    family, table = experiment.index["experiment"]["family"], smallest_table(contest)
    table = table[table["detector"] == family] if len(table) else table
    if not len(table):
        raise ValueError(f"draw=smallest is not allowed: {family!r} has no fault with a number of bits")
    places = list(dict.fromkeys(zip(table["layers"], table["heads"], strict=True)))
    shares = sorted(table["share"].unique(), reverse=True)
    figure, axes = plt.subplots(
        1, len(places), figsize=(1.6 + 4.0 * len(places), 0.62 * len(shares) + 1.9), squeeze=False, sharey=True
    )
    last = experiment.horizon
    for axis, (layers, heads) in zip(axes[0], places, strict=True):
        here = table[(table["layers"] == layers) & (table["heads"] == heads)]
        delay = here.pivot_table(index="share", columns="bits", values="median_delay_steps", dropna=False, sort=True)
        delay = delay.reindex(index=shares)
        said = delay.map(lambda steps: NEVER if pd.isna(steps) else f"{steps:,.0f}")
        sns.heatmap(
            delay.fillna(last) + 1, ax=axis, annot=said, fmt="", cmap="Blues_r", norm=LogNorm(1, last), cbar=False,
            linewidths=1.5, linecolor="white", annot_kws={"fontsize": 13},
        )  # fmt: skip
        axis.set_xlabel("truncated bits")
        axis.set_ylabel("")
        everywhere = layers == heads == "all"
        axis.set_title("every head" if everywhere else f"layer {layers}, head {heads}", fontsize=12)
        axis.tick_params(length=0)
    axes[0, 0].set_yticklabels([_said(share) for share in shares], rotation=0)
    axes[0, 0].set_ylabel("elements hit")
    every = int(table["reads_every_steps"].iloc[0])
    figure.suptitle(
        f"Steps from onset to the alarm, read every {'step' if every == 1 else f'{every} steps'}",
        x=0.02, ha="left", fontsize=13, weight="bold", y=1.04,
    )  # fmt: skip
    save(figure, path)
    runs = int(np.min(table["runs"]))
    return (
        f"Median number of steps from a fault's onset to the alarm of {family}, by truncated bits and by the share of "
        f"elements that lose them; {NEVER}: the median run has no alarm. {runs} runs a cell, thresholds at "
        f"{experiment.alpha:.0%} false alarms per run."
    )


def _said(share: float) -> str:
    return "all" if share == 1 else "one" if share == 0 else f"1 in {round(1 / share):,}"
