"""The picture of a fault that may do nothing: paired differences to the control, and whether errors keep a sign."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from foreshock.analysis.figures.drawing import ALARM, FAULTY, HEALTHY, pretty, save, style
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.scores.paired import control_of, differences, drift_table, paired_table


def paired_figure(experiment: Experiment, path: Path) -> str:
    """A column a panel: a dot a seed, the mean and its interval; then a column a drifting signal. Returns a caption."""
    style()
    control, table, drift = control_of(experiment), paired_table(experiment), drift_table(experiment)
    faults, signals = experiment.faults, list(experiment.index["experiment"]["drift"])
    columns = len(experiment.panels) + len(signals)
    figure, axes = plt.subplots(
        1, columns, figsize=(2.75 * columns + 1.2, 0.62 * len(faults) + 1.9), sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, (name, panel) in zip(axes[0], experiment.panels.items(), strict=False):
        axis.axvline(0, color=HEALTHY, linewidth=1.4, zorder=0)
        axis.plot(0, faults.index(control), "D", color=HEALTHY, markersize=6)
        rows = table[table["panel"] == name].set_index("fault")
        for fault, values in differences(experiment, name).items():
            _dots(axis, values, faults.index(fault))
            row = rows.loc[fault]
            if np.isfinite(row["low"]):
                axis.plot([row["low"], row["high"]], [faults.index(fault)] * 2, color=ALARM, linewidth=2.2, zorder=4)
            axis.plot(row["mean_difference"], faults.index(fault), "D", color=ALARM, markersize=6, zorder=5)
        unit = experiment.signals[panel["signals"][0]].unit
        axis.set_xlabel(f"{pretty(name)},\ndifference" + ("" if unit == "1" else f" ({unit})"))
    for axis, signal in zip(axes[0][len(experiment.panels) :], signals, strict=True):
        axis.axvline(1, color=HEALTHY, linewidth=1.4, zorder=0)
        for fault in faults:
            of_fault = drift[(drift["signal"] == signal) & (drift["fault"] == fault)]
            _dots(axis, np.sqrt((of_fault["t"] ** 2).groupby(of_fault["seed"]).mean()), faults.index(fault))
            overall = np.sqrt((of_fault["t"] ** 2).mean())
            axis.plot(overall, faults.index(fault), "D", color=ALARM, markersize=6, zorder=5)
        axis.set_xlim(0, max(2.5, axis.get_xlim()[1]))
        axis.set_xlabel(f"{_said(experiment, signal)}: mean /\nstandard error (rms of heads)")
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(faults)), [" ".join(experiment.label(fault).split()) for fault in faults])
    axes[0, 0].set_ylim(len(faults) - 0.4, -0.6)
    save(figure, path)
    seeds, label = len(experiment.of("faulty", fault=control)), " ".join(experiment.label(control).split())
    return (
        f"Differences to {label} of the same seed, mean of the last tenth of {experiment.horizon:,} {experiment.axis}: "
        f"one dot a seed ({seeds} seeds), diamond: mean, bar: its 95 % interval (none under 10 seeds). Last: whether "
        "readings over the run keep one sign; 1 (blue) is what errors without a sign give."
    )


def _dots(axis: plt.Axes, values: np.ndarray, y: int) -> None:
    """One dot a seed, a little apart so that equal ones stay visible."""
    aside = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else np.zeros(1)
    axis.scatter(values, y + aside, s=18, color=FAULTY, alpha=0.7, linewidths=0, zorder=2)


def _said(experiment: Experiment, signal: str) -> str:
    """The name of the detector that is this signal alone, else the signal's own."""
    named = (name for name, signals in experiment.named_detectors.items() if signals == (signal,))
    return pretty(next(named, signal))
