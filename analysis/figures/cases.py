"""Every case's ratios to predicted noise in one picture: where they lie, against 1 and against the thresholds."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.transforms import ScaledTranslation

from foreshock.analysis.figures.drawing import COLOURS, FAULTY, HEALTHY, save, style

INSIDE = (0.9, 1.1)
"""Root mean squares that the prediction is held to."""

LEGEND_BELOW_INCHES = 0.7
"""From the axis to the legend, whatever the number of cases."""


def cases_figure(table: pd.DataFrame, path: Path) -> str:
    """A line a case: the middle half and 90 % of the ratios of each law, their RMS, the largest. Returns a caption.

    table: ``analysis.scores.cases.case_table``. Cases stand in its order; a law without any reading has no line.
    """
    style()
    laws = [law for law in table["law"].unique() if law != "all"]
    cases = table["label"].unique()
    colours = dict(zip(laws, (colour for colour in COLOURS if colour != FAULTY), strict=False))
    figure, axis = plt.subplots(figsize=(10.5, 0.55 * len(cases) + 1.6))
    axis.axvspan(*INSIDE, color="0.9", zorder=0)
    axis.axvline(1, color="0.5", linewidth=1, zorder=1)
    for number, label in enumerate(cases):
        rows = table[table["label"] == label].set_index("law")
        for place, law in enumerate(laws):
            row = rows.loc[law]
            if np.isnan(row["rms"]):
                continue
            y = number + 0.72 * ((place + 0.5) / len(laws) - 0.5)
            axis.plot([row["q5"], row["q95"]], [y, y], color=colours[law], linewidth=1.3, solid_capstyle="butt")
            axis.plot([row["q25"], row["q75"]], [y, y], color=colours[law], linewidth=4, solid_capstyle="butt")
            axis.plot(row["rms"], y, marker="|", markersize=8, markeredgewidth=2, color="black", zorder=3)
            above = row["largest"] > rows.loc["all", "threshold_5pct"]
            axis.plot(row["largest"], y, marker="o", markersize=4, color=FAULTY if above else colours[law], zorder=4)
        for end, line in (("5pct", "-"), ("01pct", ":")):
            limit = rows.loc["all", f"threshold_{end}"]
            axis.plot([limit, limit], [number - 0.45, number + 0.45], color=FAULTY, linestyle=line, linewidth=1.5)
        whole = rows.loc["all"]
        said = f"{whole['alarms_5pct']:.0f} of {whole['runs']:.0f}"
        axis.annotate(said, (1.01, number), xycoords=("axes fraction", "data"), va="center", fontsize=9.5)
    axis.annotate("runs that\nalarm, 5 %", (1.01, -0.8), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
    axis.set_yticks(range(len(cases)), cases)
    for tick, label in zip(axis.get_yticklabels(), cases, strict=True):
        tick.set_color("black" if table.loc[table["label"] == label, "healthy"].all() else FAULTY)
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.set_xscale("log")
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100) if t <= 1.2 * table["largest"].replace(np.inf, np.nan).max()]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("residual over what rounding alone predicts")
    handles = [plt.Line2D([], [], color=colours[law], linewidth=4, label=law) for law in laws]
    handles += [
        plt.Line2D([], [], color="black", marker="|", markersize=9, markeredgewidth=2, linestyle="", label="RMS"),
        plt.Line2D([], [], color=HEALTHY, marker="o", markersize=4, linestyle="", label="largest"),
        plt.Line2D([], [], color=FAULTY, label="threshold, 5 % a run"),
        plt.Line2D([], [], color=FAULTY, linestyle=":", label="threshold, 0.1 %"),
    ]
    below = axis.transAxes + ScaledTranslation(0, -LEGEND_BELOW_INCHES, figure.dpi_scale_trans)
    axis.legend(
        handles=handles, ncols=4, loc="upper center", bbox_to_anchor=(0.4, 0), bbox_transform=below, frameon=False,
        fontsize=9.5,
    )  # fmt: skip
    save(figure, path)
    return (
        "Ratios of attention's four laws to what rounding alone predicts, by case: 90 % and the middle half of all "
        "readings, their root mean square (grey band: 0.9 to 1.1) and the largest, against the thresholds that the "
        "prediction gives at 5 % and 0.1 % false alarms a run. At the right, runs with a ratio above the first."
    )
