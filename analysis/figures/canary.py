"""Runs after a change in front of the healthy ones: held-out loss, and the signals that left the band first."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from foreshock.analysis.figures.drawing import ALARM, FAULTY, HEALTHY, PLAIN, THOUSANDS, save, style
from foreshock.analysis.probes.band import Band
from foreshock.analysis.probes.canary import HELD_OUT, Breach, Verdict
from foreshock.experiments.trace import Trace
from foreshock.monitors.signal import Signal

PANELS = 4
USUAL = (HELD_OUT, "train_loss_raw", "grad_global_norm", "update_to_weight_ratio")
"""Signals that are drawn where fewer have left the band."""


def draw(path: Path, band: Band, verdict: Verdict) -> None:
    """Write the picture: a panel a signal, healthy runs behind, runs after the change in front."""
    style()
    names = drawn_signals(band, verdict)
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        _panel(axis, name, band, verdict)
    outside = sum(canary.outside for canary in verdict.canaries)
    figure.suptitle(f"{outside} of {len(verdict.canaries)} runs after the change stand outside the healthy band")
    handles = [
        Line2D([], [], color=HEALTHY, alpha=0.6, label=f"healthy ({len(band.runs)} runs)"),
        Line2D([], [], color=FAULTY, linewidth=1.8, label=f"after the change ({len(verdict.canaries)})"),
        Line2D([], [], color=ALARM, marker="v", linestyle="", label="leaves the band"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def drawn_signals(band: Band, verdict: Verdict) -> list[str]:
    """Held-out loss, the first signal of each kind that left the band, in that order, then the usual ones."""
    leaving = sorted(verdict.breaches, key=lambda breach: (breach.step, -breach.over_limit))
    runs = [*band.runs.values(), *(canary.run for canary in verdict.canaries)]
    there = set.intersection(*({*run.signals} for run in runs))
    wanted = [HELD_OUT, *(breach.signal for breach in leaving), *USUAL]
    of_each: dict[str, str] = {}
    for name in wanted:
        if name in there:
            of_each.setdefault(runs[0].described[name].reference, name)
    return list(of_each.values())[:PANELS] or sorted(there)[:1]


def _panel(axis: plt.Axes, name: str, band: Band, verdict: Verdict) -> None:
    signal = next(iter(band.runs.values())).described[name]
    first = next((breach for breach in verdict.breaches if breach.signal == name), None)
    for run in band.runs.values():
        axis.plot(*_curve(run, name, signal, first, band.steps), color=HEALTHY, alpha=0.35, linewidth=1)
    for canary in verdict.canaries:
        steps, values = _curve(canary.run, name, signal, first, band.steps)
        axis.plot(steps, values, color=FAULTY, linewidth=1.8)
        left = next((breach for breach in canary.breaches if breach.signal == name), None)
        if left is not None and left.step in steps:
            axis.plot(left.step, values[steps == left.step], color=ALARM, marker="v", linestyle="")
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines])
    positive = drawn[np.isfinite(drawn) & (drawn > 0)]
    if len(positive) == len(drawn) > 0 and positive.max() > 50 * positive.min():
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(PLAIN)
    axis.set_xlabel("optimizer step")
    axis.set_xlim(0, band.steps)
    axis.xaxis.set_major_formatter(THOUSANDS)
    unit = "" if signal.unit == "1" else f" ({signal.unit})"
    axis.set_ylabel("\n".join([*textwrap.wrap(name.replace("_", " "), 26), _place(signal, first) + unit]).strip())


def _curve(run: Trace, name: str, signal: Signal, first: Breach | None, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values: of the layer and head that left the band first, else their worst or mean."""
    series = run.signals[name]
    kept = series.steps <= last
    values = np.where(series.undefined, np.nan, series.values)[kept]
    if first is not None:
        return series.steps[kept], values[:, first.layer or 0, first.head or 0]
    if signal.bad == "both":
        return series.steps[kept], np.nanmean(values, axis=(1, 2))
    worst = np.nanmax(values, axis=(1, 2)) if signal.bad == "up" else np.nanmin(values, axis=(1, 2))
    return series.steps[kept], worst


def _place(signal: Signal, first: Breach | None) -> str:
    if first is None:
        worst = {"up": "largest of", "down": "smallest of", "both": "mean over"}[signal.bad]
        return f"{worst} {' and '.join(f'{axis}s' for axis in signal.axes)}" if signal.axes else ""
    at = [f"layer {first.layer}"] * (first.layer is not None) + [f"head {first.head}"] * (first.head is not None)
    return ", ".join(at)
