"""The leaderboard in one picture: how early each detector alarms under each fault, and at what false-alarm rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from foreshock.analysis.figures.drawing import ALARM, COLOURS, HEALTHY, THOUSANDS, pretty, save, style
from foreshock.analysis.scores.contest import ALL_FAULTS, Contest, run_scores
from foreshock.analysis.scores.leaderboard import board

BASELINE, ENTRANT, ASIDE = COLOURS[1], COLOURS[2], "0.55"
COLOUR_OF_KIND = {
    "detector": HEALTHY,
    "baseline": BASELINE,
    "entrant": ENTRANT,
    "external": ENTRANT,
    "control": ASIDE,
    "oracle": ASIDE,
}
MEANING = {
    HEALTHY: "detector",
    BASELINE: "baseline",
    ENTRANT: "entrant",
    ASIDE: "control or oracle: not ranked",
}
PALE, FULL = 0.28, 0.8


def leads_figure(contest: Contest, path: Path) -> str:
    """The leaderboard of a contest, without single signals. Returns a caption."""
    named = contest.without_singles()
    return leaderboard_figure(named, board(named, run_scores(named)), path)


def leaderboard_figure(contest: Contest, rows: pd.DataFrame, path: Path) -> str:
    """One model on one track: mean restricted lead under faults that diverge, alarms under others and in healthy runs.

    Detectors are ordered by their share of the possible lead. rows: of ``leaderboard.board``. Returns a caption.
    """
    style()
    labels = {fault: _one_line(contest.experiment.label(fault)) for fault in contest.experiment.faults}
    known = rows[rows["declined"].isna()]
    overall = known[known["fault"] == ALL_FAULTS].set_index("detector")
    names = overall["share_of_possible_lead"].fillna(-1.0).sort_values(kind="stable").index.tolist()
    by_fault = {fault: known[known["fault"] == fault].set_index("detector") for fault in labels}
    diverging = [fault for fault, of_fault in by_fault.items() if of_fault["diverged"].max() > 0]
    benign = [fault for fault, of_fault in by_fault.items() if len(of_fault) and fault not in diverging]
    widths = [1.0] * len(diverging) + [0.55] * (len(benign) + 2)
    figure, axes = plt.subplots(
        1,
        len(widths),
        sharey=True,
        squeeze=False,
        figsize=(3.4 + 2.6 * sum(widths), 0.3 * len(names) + 2.6),
        gridspec_kw={"width_ratios": widths, "wspace": 0.12},
    )
    panels = iter(axes[0])
    for fault in diverging:
        _diverging_panel(next(panels), by_fault[fault], names, labels[fault])
    share = next(panels)
    _points(share, overall, names, ("share_of_possible_lead", "share_low", "share_high"))
    share.set_title("all faults\nshare of the\npossible lead", fontsize=11)
    share.set_xlabel("mean lead /\npossible lead")
    for fault in benign:
        _benign_panel(next(panels), by_fault[fault], names, labels[fault])
    _healthy_panel(next(panels), overall, names)
    _name_rows(axes[0], names, overall)
    _title(figure, contest, rows)
    alpha = overall["alpha"].max()
    figure.legend(
        handles=_legend(set(overall["kind"]), bool(np.isfinite(alpha)), alpha),
        loc="upper center",
        bbox_to_anchor=(0.45, 0.11 - 0.75 / figure.get_figheight()),
        ncol=3,
        frameon=False,
        fontsize=10,
    )
    save(figure, path)
    return (
        "Mean lead before divergence with its 95 % interval over seeds (a miss counts 0; right is better), the share "
        "of the possible lead with faults weighted equally, alarms under faults that do not diverge, and false alarms "
        "in healthy test runs against the rate aimed at (dotted). Strong bars are possibly the best of their fault (95 "
        "% model confidence set). Orange: baselines; grey: controls, from one that never alarms to one that knows the "
        "onset, and oracles that read the fault itself."
    )


def _diverging_panel(axis: plt.Axes, rows: pd.DataFrame, names: list[str], label: str) -> None:
    """Mean leads under a fault that diverges. rows: of that fault, by detector."""
    _leads(axis, rows, names)
    diverged, runs = rows["diverged"].max(), rows["runs"].max()
    axis.set_title(f"{label}\n{diverged:.0f} of {runs:.0f} runs diverge", fontsize=11)


def _benign_panel(axis: plt.Axes, rows: pd.DataFrame, names: list[str], label: str) -> None:
    """Alarms under a fault that does not diverge. rows: of that fault, by detector."""
    _points(axis, rows, names, ("detected", "detected_low", "detected_high"))
    degraded, runs = rows["degraded"].max(), rows["runs"].max()
    axis.set_title(f"{label}\nnone diverges,\n{degraded:.0f} of {runs:.0f} degrade", fontsize=11)
    axis.set_xlabel("alarms\n(share of runs)")


def _healthy_panel(axis: plt.Axes, overall: pd.DataFrame, names: list[str]) -> None:
    """False alarms, and the rate aimed at where the track has one. overall: rows of all faults, by detector."""
    rows = overall.assign(rate=overall["healthy_alarms"] / overall["healthy_runs"].replace(0, np.nan))
    _points(axis, rows, names, ("rate", "false_alarm_low", "false_alarm_high"))
    axis.set_title(f"healthy\n{overall['healthy_runs'].max():.0f} test runs", fontsize=11)
    axis.set_xlabel("false alarms\n(share of runs)")
    alpha = overall["alpha"].max()
    if np.isfinite(alpha):
        axis.axvline(alpha, color=ALARM, linewidth=1, linestyle=":")


def _name_rows(axes: Sequence[plt.Axes], names: list[str], overall: pd.DataFrame) -> None:
    """The detectors' names at the first panel, and a line for each in every panel."""
    first = axes[0]
    first.set_yticks(range(len(names)), [pretty(name) for name in names], fontsize=9.5)
    first.set_ylim(-0.7, len(names) - 0.3)
    for label, name in zip(first.get_yticklabels(), names, strict=True):
        label.set_color("0.45" if COLOUR_OF_KIND[overall.loc[name, "kind"]] == ASIDE else ALARM)
    for axis in axes:
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="0.93", linewidth=0.8)
        axis.tick_params(axis="y", length=0)


def _title(figure: plt.Figure, contest: Contest, rows: pd.DataFrame) -> None:
    """What the picture shows, on which track, and who is not judged there."""
    height = figure.get_figheight()
    title = f"{contest.experiment.index['experiment']['title']}: which detector alarms first under which fault?"
    figure.text(0.01, 0.88 + 1.3 / height, title, fontsize=14, weight="bold")
    declined = rows.loc[rows["declined"].notna(), "detector"]
    said = f"{contest.track.name} track at {contest.alpha:.0%} false alarms per run"
    said += f"; not judged: {', '.join(declined)}" if len(declined) else ""
    figure.text(0.01, 0.88 + 1.05 / height, said, fontsize=10.5, color="0.35")


def _legend(kinds: set[str], aims: bool, alpha: float) -> list:
    colours = {COLOUR_OF_KIND[kind] for kind in kinds}
    handles: list = [Patch(color=colour, label=said) for colour, said in MEANING.items() if colour in colours]
    handles.append(Patch(color="0.2", alpha=FULL, label="strong bar: possibly the best of its fault"))
    handles.append(Line2D([], [], color="0.2", marker="o", markersize=4.5, linewidth=2, label="mean, 95 % interval"))
    if aims:
        handles.append(Line2D([], [], color=ALARM, linestyle=":", label=f"false alarms aimed at ({alpha:.0%})"))
    return handles


def _one_line(label: str) -> str:
    return " ".join(label.split())


def _leads(axis: plt.Axes, rows: pd.DataFrame, names: list[str]) -> None:
    for y, name in enumerate(names):
        if name not in rows.index or pd.isna(rows.loc[name, "rmlt_steps"]):
            continue
        row = rows.loc[name]
        colour = COLOUR_OF_KIND[row["kind"]]
        best = row["possibly_best"] is True
        axis.barh(y, row["rmlt_steps"], color=colour, alpha=FULL if best else PALE, height=0.66)
        colour = "0.2" if best else colour
        if pd.notna(row["rmlt_low"]):
            axis.plot([row["rmlt_low"], row["rmlt_high"]], [y, y], color=colour, linewidth=2)
        axis.plot(row["rmlt_steps"], y, "o", color=colour, markersize=4.5)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))  # the last label would meet the next panel's first
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.set_xlabel("mean lead\n(optimizer steps)")


def _points(axis: plt.Axes, rows: pd.DataFrame, names: list[str], columns: tuple[str, str, str]) -> None:
    middle, low, high = columns
    for y, name in enumerate(names):
        if name in rows.index and pd.notna(rows.loc[name, middle]):
            row = rows.loc[name]
            colour = COLOUR_OF_KIND[row["kind"]]
            if pd.notna(row[low]):
                axis.plot([row[low], row[high]], [y, y], color=colour, linewidth=1.5, alpha=0.45)
            axis.plot(row[middle], y, "o", color=colour, markersize=4.5)
    axis.set_xlim(-0.05, 1.05)
    axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
