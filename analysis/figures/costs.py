"""What a detector costs and how soon it alarms."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter

from foreshock.analysis.figures.delay_axis import delay_axis
from foreshock.analysis.figures.drawing import HEALTHY, pretty, save, style
from foreshock.analysis.figures.point_names import label_points
from foreshock.analysis.locate.fault_truth import broken_kernels
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.costs import detector_cost, monitor_costs
from foreshock.analysis.scores.delays import delays, median_delay, oracles


def cost_faults(experiment: Experiment) -> list[str]:
    """The faults that the cost figure takes its medians over: the key ``cost_faults``, or every broken kernel.

    Of those named, the ones that were run.
    """
    named = experiment.index["experiment"].get("cost_faults") or ()
    return [fault for fault in experiment.faults if fault in named] or broken_kernels(experiment)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, delay) that no other beats in one and equals in the other, cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def cost_figure(contest: Contest, path: Path) -> str:
    """One point a detector: the cost of its monitors against the median delay of its alarm. Returns a caption."""
    style()
    experiment = contest.experiment
    chosen, costs, bounds = cost_faults(experiment), monitor_costs(experiment.model), oracles(experiment)
    delays_of_runs = delays(contest)
    delays_of_runs = delays_of_runs[delays_of_runs["fault"].isin(chosen)]
    rows = pd.DataFrame({"delay": delays_of_runs.groupby("detector", sort=False)["delay_steps"].apply(median_delay)})
    rows["cost"] = [100 * detector_cost(experiment.named_detectors[name], costs) for name in rows.index]
    unmeasured = rows.index[rows["cost"].isna()]
    rows = rows.dropna(subset="cost")
    figure, axis = plt.subplots(figsize=(9.5, 5.6))
    never = delay_axis(axis, experiment.horizon, rows["delay"].min())
    points = list(zip(rows["cost"], rows["delay"].fillna(never), strict=True))
    rivals = [point if name not in bounds else (np.inf, np.inf) for name, point in zip(rows.index, points, strict=True)]
    front = [i for i in pareto_front(rivals) if points[i][1] < never and rows.index[i] not in bounds]
    axis.set_xscale("log")
    if len(rows):
        axis.set_xlim(rows["cost"].min() / 1.7, rows["cost"].max() * 5)
    else:
        axis.text(0.5, 0.4, "no cost was measured for this model", transform=axis.transAxes, ha="center", color="0.35")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    if front:
        x, y = zip(*(points[i] for i in front), strict=True)
        axis.step(
            [*x, axis.get_xlim()[1]], [*y, y[-1]], where="post", color=HEALTHY, linewidth=1.5, alpha=0.6, zorder=1
        )
    alarmed = rows["delay"].notna().to_numpy()
    for chosen_points, colour in ((alarmed, HEALTHY), (~alarmed, "0.55")):
        here = [point for point, good in zip(points, chosen_points, strict=True) if good]
        if here:
            x_here, y_here = zip(*here, strict=True)
            axis.scatter(x_here, y_here, color=colour, s=42, zorder=3)
    lines = [never, *(points[i][1] for i in front[-1:])] if len(rows) else []
    together: dict[tuple[float, float], list[str]] = {}
    for name, point in zip(rows.index, points, strict=True):
        together.setdefault(point, []).append(pretty(name))
    if together:
        labels = ["\n".join(names) for names in together.values()]
        label_points(axis, list(together), labels, lines=lines, fontsize=9.5)
    alarmed_names = {pretty(name) for name in rows.index[alarmed]}
    for label in axis.texts:
        label.set_color(HEALTHY if label.get_text().split("\n")[0] in alarmed_names else "0.35")
    axis.set_xlabel("cost of its monitors, share of a training step")
    axis.set_ylabel("median steps from onset to first alarm")
    runs = delays_of_runs["run_id"].nunique()
    axis.set_title(
        "Sooner is lower, cheaper is left", loc="left", fontsize=13, weight="bold", pad=12
    )  # fmt: skip
    said = f"{len(chosen)} faults, {runs} runs, at {experiment.alpha:.0%} false alarms per run; line: Pareto front"
    said += f"; cost not measured: {', '.join(pretty(name) for name in unmeasured)}" if len(unmeasured) else ""
    figure.text(0.01, -0.03, textwrap.fill(said, 120), fontsize=10, color="0.35", va="top")
    save(figure, path)
    faults = ", ".join(" ".join(experiment.label(fault).split()) for fault in chosen)
    return (
        "What it costs to be warned: the median number of steps from a fault's onset to each detector's first alarm "
        f"against the share of a training step that its monitors take. Faults: {faults}. A detector without an alarm "
        "in the median run stands on the grey line; nothing else is both cheaper and sooner than the Pareto front."
    )
