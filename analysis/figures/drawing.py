"""What all pictures share: colours, names, axes, files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FuncFormatter

from foreshock.analysis.runs.experiment import Experiment, ScoredRun
from foreshock.analysis.runs.readings import curve
from foreshock.monitors.signal import RATIO

COLOURS = sns.color_palette("colorblind")
HEALTHY, FAULTY, ALARM = COLOURS[0], COLOURS[3], "#222222"
THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
MILLIONS = FuncFormatter(lambda value, _: f"{value / 1e6:g}")
PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")
SMOOTHING_SAMPLES = 50
"""Signals sampled at every step are drawn as a rolling median over so many, which is causal."""


def style() -> None:
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "savefig.dpi": 120})


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def pretty(name: str) -> str:
    """Detector names with their symbols."""
    for plain, symbol in (("Delta-", "Δ-"), ("Delta W", "ΔW"), ("Delta1", "Δ₁"), ("Delta2", "Δ₂"), ("Delta3", "Δ₃")):
        name = name.replace(plain, symbol)
    return name


def drawn_curve(experiment: Experiment, run: ScoredRun, panel: Mapping[str, Any]) -> pd.Series:
    """A run's curve as pictures show it, with a point where a healthy run has one: a causal rolling median.

    At equal tokens a small batch has several samples there. Signals of every step are smoothed further.
    """
    values = curve(experiment, run, panel)
    healthy = curve(experiment, experiment.of("reference")[0], panel)
    dense = experiment.signals[panel["signals"][0]].every_steps < 5
    if len(values) < 2 or len(healthy) < 2:
        return values
    ratio = max(1, round((healthy.index[1] - healthy.index[0]) / (values.index[1] - values.index[0])))
    smooth = values.rolling(ratio * (SMOOTHING_SAMPLES if dense else 1), min_periods=1).median()
    return smooth.iloc[ratio - 1 :: ratio]


def value_label(experiment: Experiment, name: str, panel: Mapping[str, Any]) -> str:
    signal = experiment.signals[panel["signals"][0]]
    unit = "" if signal.unit == "1" else f"\n({signal.unit})"
    if all(experiment.signals[name].kind == RATIO for name in panel["signals"]):
        unit = "\n(ratio to rounding)"
    name = textwrap.fill(pretty(name), 22)
    if panel.get("reduce") == "mean":
        return f"{name}\nlayer mean{unit}"
    worst = {0: "", 1: "\nworst layer", 2: "\nworst head"}[len(signal.axes)]
    return f"{name}{worst}{unit}"


def label_positions(axis: plt.Axes, experiment: Experiment) -> None:
    """Name and format a position axis by the experiment's alignment."""
    axis.set_xlabel("optimizer step" if experiment.axis == "steps" else "training tokens (millions)")
    axis.set_xlim(0, experiment.horizon)
    axis.xaxis.set_major_formatter(THOUSANDS if experiment.axis == "steps" else MILLIONS)
