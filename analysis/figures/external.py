"""Detected failures beside the false alarms that they cost, on public logs with real failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from foreshock.analysis.figures.drawing import COLOURS, save, style

DETECTED, FALSE = COLOURS[2], COLOURS[3]
PANELS = {
    "AlgoPerf": ("pooled", "AlgoPerf, WMT and ImageNet ViT: the validation loss rises by 0.5 nats"),
    "MX-FP6 E2M3": ("cell", "Language models in FP6 (E2M3): the training loss rises by 0.1 nats"),
}
"""By logs the scope of the calibrated rows that are drawn, and the panel's title."""

LABEL_INPUT = {"MX-FP6 E2M3": "training loss"}
"""How detectors begin that read what the label is made of."""

HEADINGS = ("calibrated to 5 % false alarms", "a fixed number")


def external_figure(table: pd.DataFrame, path: Path) -> None:
    """Draw rows of ``detectors.csv``: shares of failures detected in time and of healthy runs with an alarm."""
    style()
    parts = {name: _rows(table[table["logs"] == name], scope) for name, (scope, _) in PANELS.items()}
    heights = [sum(map(len, groups)) + 2 for groups in parts.values()]
    figure, axes = plt.subplots(
        len(parts), 1, figsize=(11, 0.36 * sum(heights) + 2), sharex=True, height_ratios=heights, squeeze=False
    )
    for axis, (name, groups) in zip(axes[:, 0], parts.items(), strict=True):
        _panel(axis, name, groups)
    axes[-1, 0].set_xlabel("share of runs, with 95 % intervals")
    axes[-1, 0].xaxis.set_major_formatter(PercentFormatter(1.0))
    axes[-1, 0].set_xlim(-0.02, 1.02)
    ring = {"marker": "o", "color": DETECTED, "mfc": "none", "ms": 10, "lw": 0}
    marks: tuple[tuple[str, dict[str, Any]], ...] = (
        ("failures detected before the loss rises", {"marker": "o", "color": DETECTED}),
        ("even before its last reading without a rise", ring),
        ("healthy runs with a (false) alarm", {"marker": "X", "color": FALSE}),
    )
    figure.legend(
        handles=[Line2D([], [], **{"ms": 8, "lw": 2, **look}, label=label) for label, look in marks],
        loc="upper left", bbox_to_anchor=(0.005, 0.97), ncols=3, frameon=False, fontsize=10.5, columnspacing=1.4,
    )  # fmt: skip
    figure.suptitle(
        "Where the gradient norm detects these real failures, it also alarms in healthy runs",
        x=0.015, y=0.995, ha="left", fontsize=14, weight="bold",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.965), h_pad=1.2)
    save(figure, path)


def _rows(table: pd.DataFrame, scope: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Calibrated rows at 5 %, and rules of a fixed number; the gradient norm first in each."""
    calibrated = table[(table["scope"] == scope) & np.isclose(table["alpha"].astype(float), 0.05)]
    order = {"detector": 0, "baseline": 1, "control": 2}
    calibrated, fixed = (
        part.sort_values("kind", key=lambda kinds: kinds.map(order), kind="stable")
        for part in (calibrated, table[table["scope"] == "fixed"])
    )
    return calibrated, fixed


def _panel(axis: plt.Axes, name: str, groups: Sequence[pd.DataFrame]) -> None:
    """One set of logs: a row a detector, in groups with a heading each."""
    at, labels, y = [], [], 0
    right: dict[str, Any] = {"va": "center", "fontsize": 10.5, "transform": axis.get_yaxis_transform()}
    axis.text(1.02, 0, "failures", color=DETECTED, **right)
    axis.text(1.135, 0, "healthy", color=FALSE, **right)
    for heading, rows in zip(HEADINGS, groups, strict=True):
        at.append(y)
        labels.append(heading)
        for row in rows.to_dict("records"):
            y += 1
            _row(axis, y, row)
            axis.text(1.02, y, f"{row['detected']}/{row['failures']}", color=DETECTED, **right)
            axis.text(1.135, y, f"{row['false_alarms']}/{row['healthy_runs']}", color=FALSE, **right)
            own_input = name in LABEL_INPUT and row["detector"].startswith(LABEL_INPUT[name])
            at.append(y)
            labels.append(f"{row['detector']}{' *' if own_input else ''}")
        y += 1
    axis.set_yticks(at, labels)
    for label in axis.get_yticklabels():
        if label.get_text() in HEADINGS:
            label.set_fontweight("bold")
    axis.set_ylim(y - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.92")
    note = "\n* reads what the label is made of" if name in LABEL_INPUT else ""
    axis.set_title(f"{PANELS[name][1]}{note}", loc="left", fontsize=11.5)


def _row(axis: plt.Axes, y: int, row: Mapping[str, Any]) -> None:
    for mark, colour, column, offset in (("o", DETECTED, "detected", -0.16), ("X", FALSE, "false_alarm", 0.16)):
        ends, look = [row[f"{column}_low"], row[f"{column}_high"]], {"color": colour, "clip_on": False}
        axis.plot(ends, [y + offset] * 2, lw=2, alpha=0.55, solid_capstyle="butt", **look)
        axis.plot(row[f"{column}_share"], y + offset, mark, ms=8, markeredgecolor="white", zorder=4, **look)
    beyond = row["beyond_check"] / row["failures"]
    axis.plot(beyond, y - 0.16, "o", ms=11, mfc="none", mec=DETECTED, mew=1.4, clip_on=False, zorder=5)
