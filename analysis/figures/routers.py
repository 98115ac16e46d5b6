"""The pictures of the router experiments: doses side by side, two faults on a grid, detectors against faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from foreshock.analysis.figures.drawing import (
    ALARM,
    COLOURS,
    HEALTHY,
    PLAIN,
    drawn_curve,
    label_positions,
    pretty,
    save,
    style,
    value_label,
)
from foreshock.analysis.locate.selectivity import alarm_matrix
from foreshock.analysis.runs.experiment import HEALTHY_ROLES, Experiment
from foreshock.analysis.runs.readings import at_end, common_end, runs_of
from foreshock.analysis.scores.contest import Contest


def _fault_colours(faults: Sequence[str], doses: bool) -> dict[str, tuple]:
    """A sequential palette for doses of one fault, distinct colours for different ones; blue is the healthy band's."""
    palette = sns.color_palette("flare", len(faults)) if doses else [COLOURS[i] for i in (1, 3, 2, 4, 5, 8)]
    return dict(zip(faults, palette, strict=False))


def _panel(axis: plt.Axes, experiment: Experiment, panel: Mapping[str, Any], colours: Mapping[str, tuple]) -> None:
    """The healthy band, every faulty run over it, and a tick at the foot where a run diverged."""
    band = pd.concat([drawn_curve(experiment, run, panel) for run in experiment.of(*HEALTHY_ROLES)], axis=1)
    axis.fill_between(band.index, band.min(axis=1), band.max(axis=1), color=HEALTHY, alpha=0.25, linewidth=0)
    axis.plot(band.index, band.median(axis=1), color=HEALTHY, linewidth=1.6)
    foot = axis.get_xaxis_transform()
    for fault, colour in colours.items():
        for run in experiment.of("faulty", fault=fault):
            values = drawn_curve(experiment, run, panel)
            axis.plot(values.index, values, color=colour, linewidth=1.1, alpha=0.85)
            if run.divergence is not None:
                tick: dict[str, Any] = {"color": colour, "markersize": 10, "markeredgewidth": 2, "clip_on": False}
                axis.plot(run.divergence, 0.03, "|", transform=foot, **tick)
    if panel.get("log"):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(PLAIN)
        axis.yaxis.set_minor_formatter(NullFormatter())


def dose_figure(experiments: Sequence[Experiment], path: Path) -> str:
    """Signals of every fault over the healthy band, a row a panel and a column a view. Returns a caption."""
    style()
    settings = experiments[0].index["experiment"]
    panels = list(settings["figure"])
    colours = _fault_colours(experiments[0].faults, settings.get("doses", False))
    alone = len(experiments) == 1
    size = (9.5 if alone else 6.2 * len(experiments), 2.35 * len(panels))
    figure, axes = plt.subplots(
        len(panels), len(experiments), figsize=size, squeeze=False, sharex="col", sharey="row"
    )  # fmt: skip
    for column, experiment in enumerate(experiments):
        for row, name in enumerate(panels):
            axis, panel = axes[row, column], experiment.panels.get(name)
            if panel is None:
                axis.set_axis_off()
                axis.text(
                    0.5,
                    0.5,
                    f"{experiment.model} has no router",
                    ha="center",
                    color="0.4",
                    fontsize=12,
                    transform=axis.transAxes,
                )
                continue
            _panel(axis, experiment, panel, colours)
            if column == 0 or experiments[0].panels.get(name) is None:
                axis.set_ylabel(value_label(experiment, name, panel), fontsize=11)
                axis.yaxis.set_tick_params(labelleft=True)
        label_positions(axes[-1, column], experiment)
        if not alone:
            same_model = len({e.model for e in experiments}) == 1
            axes[0, column].set_title(f"at equal {experiment.axis}" if same_model else experiment.model, fontsize=13)
    handles: list[Artist] = [
        Patch(color=HEALTHY, alpha=0.25, label=f"healthy, {len(experiments[0].of(*HEALTHY_ROLES))} runs")
    ]
    handles += [Line2D([], [], color=c, linewidth=2.5, label=experiments[0].label(f)) for f, c in colours.items()]
    if any(run.divergence is not None for e in experiments for run in e.of("faulty")):
        tick: dict[str, Any] = {"marker": "|", "linestyle": "", "markersize": 11, "markeredgewidth": 2}
        handles.append(Line2D([], [], color="0.4", label="loss diverges", **tick))
    height = figure.get_size_inches()[1]
    figure.align_ylabels(axes[:, 0])
    figure.subplots_adjust(top=1 - (0.55 if alone else 0.85) / height, hspace=0.2, wspace=0.08)
    figure.legend(
        handles=handles, loc="upper center", ncol=len(handles), frameon=False, fontsize=10.5,
        bbox_to_anchor=(0.5, 1 - 0.02 / height), columnspacing=1.2, handlelength=1.5,
    )  # fmt: skip
    save(figure, path)
    return "Thin lines are single runs, the band is the range of all healthy runs, the thick line their median."


def grid_figure(experiment: Experiment, path: Path) -> str:
    """A heat map a panel over the product of two faults: medians over runs at the common end. Returns a caption."""
    style()
    settings = experiment.index["experiment"]
    cells = {tuple(node["cell"]): fault for fault, node in settings["faults"].items()}
    cells[tuple(settings["healthy_cell"])] = None
    factors, shares = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    shares = shares[::-1]
    end = common_end(experiment, list(cells.values()))

    def cell(factor: float, share: float, panel: Mapping[str, Any]) -> float:
        known = (factor, share) in cells  # an experiment may leave cells out
        return float(np.median(at_end(experiment, cells[factor, share], panel, end))) if known else np.nan

    tables = {
        name: np.array([[cell(factor, share, panel) for factor in factors] for share in shares])
        for name, panel in experiment.panels.items()
    }
    low, high = np.nanmin(list(tables.values())), np.nanmax(list(tables.values()))
    figure, axes = plt.subplots(1, len(tables), figsize=(5.3 * len(tables), 3.6), sharey=True, squeeze=False)
    for index, (axis, (name, panel)) in enumerate(zip(axes[0], experiment.panels.items(), strict=True)):
        sns.heatmap(
            tables[name], ax=axis, vmin=low, vmax=high, cmap="viridis", annot=True, fmt=".2f",
            cbar=index == len(tables) - 1, cbar_kws={"label": "routing entropy / ln E"}, linewidths=1.5,
            linecolor="white",
            xticklabels=[f"×{factor:g}" for factor in factors], yticklabels=[_share(share) for share in shares],
        )  # fmt: skip
        axis.set_title("layer mean" if panel.get("reduce") == "mean" else "worst layer", fontsize=12)
        axis.set_xlabel("learning rate")
        axis.set_ylabel("" if index else "batch")
        axis.tick_params(axis="y", rotation=0)
    save(figure, path)
    counts = sorted(len(runs_of(experiment, fault)) for fault in cells.values())
    return (
        f"Each cell is the median of {counts[0]} runs, the healthy one of {counts[-1]}, at {end:,} {experiment.axis}."
    )


def _share(value: float) -> str:
    """1/8 for 0.125."""
    return "1" if value == 1 else f"1/{1 / value:g}"


def selectivity_figure(contest: Contest, path: Path) -> str:
    """P[detector, fault] as a heat map; the lines part the groups of detectors. Returns a caption."""
    style()
    experiment, matrix = contest.experiment, alarm_matrix(contest)
    if matrix["healthy"].isna().all():
        matrix = matrix.drop(columns="healthy")
    declined = [name for name in experiment.named_detectors if name not in matrix.index]
    counts = {fault: len(experiment.of("faulty", fault=fault)) for fault in experiment.faults}
    counts["healthy"] = len(experiment.of("test"))
    figure, axis = plt.subplots(figsize=(1.15 * len(matrix.columns) + 3.2, 0.42 * len(matrix) + 2.0))
    sns.heatmap(
        matrix.astype(float), ax=axis, vmin=0, vmax=1, cmap="rocket_r", annot=True, fmt=".1f", linewidths=1.2,
        linecolor="white", cbar_kws={"label": "share of runs with an alarm in time", "shrink": 0.5, "aspect": 15},
        annot_kws={"fontsize": 10},
    )  # fmt: skip
    axis.set_xticklabels(
        [f"{experiment.label(None if f == 'healthy' else f)}\nn={counts[f]}" for f in matrix.columns],
        rotation=0,
        fontsize=10,
    )
    axis.set_yticklabels([pretty(name) for name in matrix.index], rotation=0, fontsize=11)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    for place, name in enumerate(matrix.index):
        if name in experiment.index["experiment"].get("groups", []):
            axis.axhline(place, color=ALARM, linewidth=1.5)
    save(figure, path)
    return (
        f"Share of runs in which each detector (row) alarms from the "
        f"onset on and before divergence, or the run's end, under each fault (column), at {experiment.alpha:.0%} "
        "false alarms per run."
        + (f" Declined, for want of spread in healthy runs: {', '.join(declined)}." if declined else "")
    )
