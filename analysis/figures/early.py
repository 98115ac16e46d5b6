"""The pictures of early warning: what a detector costs and how soon it alarms, and how small a fault it detects."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from foreshock.analysis.figures.drawing import ALARM, COLOURS, HEALTHY, PLAIN, pretty, save, style
from foreshock.analysis.figures.point_names import label_points
from foreshock.analysis.locate.fault_truth import broken_kernels
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.costs import detector_cost, monitor_costs
from foreshock.analysis.scores.delays import delays, median_delay, oracles, sizes
from foreshock.analysis.scores.table import median_step

NEVER = "none by\nthe end"
MARKERS = "osD^vPX"
NAMED = len(MARKERS)
"""Lines that have a colour and a name of their own; slower detectors are thin and grey."""


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
    never = _delay_axis(axis, experiment.horizon, rows["delay"].min())
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


def _delay_axis(axis: plt.Axes, horizon: int, soonest: float) -> float:
    """A logarithmic axis of delays with a marked line for none; returns where that line stands.

    soonest: the smallest delay on it, NaN for none; from 1 on the axis needs no 0.
    """
    axis.set_yscale("symlog", linthresh=1)
    decades = [0.0, *(10.0**i for i in range(int(np.log10(horizon)) + 1))]
    never = 10 ** (np.log10(horizon) + 0.45)
    axis.set_ylim(0.8 if soonest >= 1 else -0.3, never * 4.5)
    axis.yaxis.set_major_locator(FixedLocator([*decades, never]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: NEVER if value == never else f"{value:,.0f}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhline(never, color="0.8", linewidth=1.2, zorder=0)
    return never


def size_figure(contest: Contest, path: Path) -> str:
    """Median delay against truncated bits, a line a detector; from the start and later on. Returns a caption."""
    style()
    experiment = contest.experiment
    known, delays_of_runs = sizes(experiment), delays(contest)
    medians = delays_of_runs.groupby(["detector", "fault"])["delay_steps"].apply(median_delay)
    swept = _swept(known)
    onsets = sorted({known[fault].onset > 0 for faults in swept.values() for fault in faults})
    names = list(delays_of_runs["detector"].unique())
    drawn = [fault for faults in swept.values() for fault in faults]
    ever = [name for name in names if any(medians[name, fault] >= 0 for fault in drawn)]
    ever.sort(key=lambda name: _order(medians, name, drawn))
    looks = {name: (COLOURS[i], MARKERS[i]) for i, name in enumerate(ever[:NAMED])}
    shape = (len(swept), len(onsets))
    figure, axes = plt.subplots(
        *shape, figsize=(4.1 * shape[1] + 3.4, 3.2 * shape[0] + 0.6), squeeze=False, sharex=True, sharey=True
    )
    diverges = False
    for row, (where, faults) in enumerate(swept.items()):
        for column, delayed in enumerate(onsets):
            axis, here = axes[row, column], [f for f in faults if (known[f].onset > 0) == delayed]
            here.sort(key=lambda fault: known[fault].bits)
            never = _delay_axis(axis, experiment.horizon, medians.min())
            bits = np.array([known[fault].bits for fault in here], float)
            for name in ever[NAMED:]:
                axis.plot(bits, _or_never(medians, name, here, never), color="0.75", linewidth=1.0, zorder=1)
            for i, (name, (colour, marker)) in enumerate(looks.items()):
                dodge = min(0.1, 0.6 / len(looks)) * (i - (len(looks) - 1) / 2)  # equal delays stand side by side
                y = _or_never(medians, name, here, never)
                axis.plot(bits + dodge, y, color=colour, marker=marker, markersize=6.5, linewidth=1.6)
            ends = [_divergence_delay(experiment, fault) for fault in here]
            if np.isfinite(ends).any():
                diverges = True
                axis.plot(bits, ends, color=ALARM, linestyle="--", linewidth=1.8)
            onset = "from the start" if not delayed else "from step " + _steps(known[f].onset for f in here)
            axis.set_title(f"{_named(where)}, {onset}" if here else f"{_named(where)}: no such fault", fontsize=11.5)
            axis.label_outer()
    every_bit = sorted({known[fault].bits for fault in drawn})
    for axis in axes[-1]:
        axis.set_xlabel("size of the fault (bits)")
        axis.xaxis.set_major_locator(FixedLocator(every_bit))
        axis.xaxis.set_major_formatter(PLAIN)
    for axis in axes[:, 0]:
        axis.set_ylabel("median steps from onset\nto first alarm")
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6.5, label=pretty(name))
        for name, (colour, marker) in looks.items()
    ]
    if ever[NAMED:]:
        handles.append(Line2D([], [], color="0.75", linewidth=1.0, label=f"{len(ever) - NAMED} other monitors"))
    if diverges:
        handles.append(Line2D([], [], color=ALARM, linestyle="--", label="loss diverges"))
    silent = [pretty(name) for name in names if name not in ever]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.91, 0.5), frameon=False, fontsize=9.5)
    figure.suptitle(
        "How small a fault raises an alarm, and how soon",
        x=0.07, ha="left", fontsize=13, weight="bold", y=0.9 + 0.5 / figure.get_figheight(),
    )  # fmt: skip
    save(figure, path)
    return (
        "Median number of steps from a fault's onset to each detector's first alarm against its size in bits, "
        f"at {experiment.alpha:.0%} false alarms per run; on the top line the median run has none by its end."
        + (" Dashed: where the loss diverges." if diverges else "")
        + (f" Grey: {', '.join(pretty(name) for name in ever[NAMED:])}." if ever[NAMED:] else "")
        + (f" No alarm in the median run: {', '.join(silent)}." if silent else "")
    )


def _or_never(medians: pd.Series, name: str, faults: Sequence[str], never: float) -> list[float]:
    return [never if np.isnan(medians[name, fault]) else medians[name, fault] for fault in faults]


def _swept(known: dict) -> dict[str, list[str]]:
    """By place, the faults there, of places that are hit with several sizes; all places where none is."""
    places: dict[str, list[str]] = {}
    for fault, size in known.items():
        places.setdefault(size.where, []).append(fault)
    if not places:
        raise ValueError("draw=early_warning is not allowed: no fault of this experiment has a number of bits")
    several = {where: faults for where, faults in places.items() if len({known[f].bits for f in faults}) > 1}
    return several or places


def _named(where: str) -> str:
    """A place for people: attention's sites in capitals, as in the paper's equations."""
    sites, *rest = where.split(", ")
    if "." in sites or "_" in sites or " " in sites:
        return where
    said = [site if len(site) > 2 else site[:-1] + site[-1].upper() for site in sites.split("+")]
    return ", ".join([" and ".join(said), *rest])


def _steps(onsets) -> str:
    return " or ".join(f"{onset:,}" for onset in sorted(set(onsets)))


def _divergence_delay(experiment: Experiment, fault: str) -> float:
    """Median steps from onset to divergence; NaN where the median run has none."""
    runs = experiment.of("faulty", fault=fault)
    delays = (None if run.divergence is None or run.onset is None else run.divergence - run.onset for run in runs)
    return median_step(delays)


def _order(medians: pd.Series, name: str, faults: Sequence[str]) -> float:
    return float(np.mean([1e9 if np.isnan(medians[name, fault]) else medians[name, fault] for fault in faults]))
