"""How small a fault each detector detects, and how soon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from foreshock.analysis.figures.delay_axis import delay_axis
from foreshock.analysis.figures.drawing import ALARM, COLOURS, PLAIN, pretty, save, style
from foreshock.analysis.runs.experiment import Experiment
from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.delays import Size, delays, median_delay, sizes
from foreshock.analysis.scores.table import median_step

MARKERS = "osD^vPX"
NAMED = len(MARKERS)
"""Lines that have a colour and a name of their own; slower detectors are thin and grey."""


@dataclass(frozen=True)
class Sweep:
    """Delays against the size of a fault: what the panels of ``size_figure`` share.

    known: the faults that have a size; medians: median delay in steps by detector and fault, NaN for no alarm; places:
    by place, the faults there.
    """

    experiment: Experiment
    known: Mapping[str, Size]
    medians: pd.Series
    places: Mapping[str, list[str]]

    @classmethod
    def of(cls, contest: Contest) -> Sweep:
        """Raises ValueError where no fault of the contest has a size, and as ``delays`` does."""
        known, delays_of_runs = sizes(contest.experiment), delays(contest)
        groups = delays_of_runs.groupby(["detector", "fault"], sort=False)["delay_steps"]
        return cls(contest.experiment, known, groups.apply(median_delay), _swept(known))

    @cached_property
    def faults(self) -> list[str]:
        return [fault for faults in self.places.values() for fault in faults]

    @cached_property
    def names(self) -> list[str]:
        return list(self.medians.index.unique("detector"))

    @cached_property
    def alarming(self) -> list[str]:
        """The detectors that alarm in the median run of some fault, the soonest first."""
        alarming = [name for name in self.names if any(self.medians[name, fault] >= 0 for fault in self.faults)]
        return sorted(alarming, key=lambda name: _order(self.medians, name, self.faults))

    @property
    def looks(self) -> dict[str, tuple[Any, str]]:
        """Colour and marker of the soonest detectors."""
        return dict(zip(self.alarming, zip(COLOURS, MARKERS, strict=False), strict=False))

    @property
    def others(self) -> list[str]:
        """The slower ones, which are thin and grey."""
        return self.alarming[NAMED:]

    @property
    def silent(self) -> list[str]:
        return [name for name in self.names if name not in self.alarming]

    def begins_later(self, fault: str) -> bool:
        return self.known[fault].onset > 0


def size_figure(contest: Contest, path: Path) -> str:
    """Median delay against truncated bits, a line a detector; from the start and later on. Returns a caption."""
    style()
    sweep = Sweep.of(contest)
    onsets = sorted({sweep.begins_later(fault) for fault in sweep.faults})
    rows, columns = len(sweep.places), len(onsets)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.1 * columns + 3.4, 3.2 * rows + 0.6), squeeze=False, sharex=True, sharey=True
    )
    diverges = False
    for row, (where, faults) in enumerate(sweep.places.items()):
        for column, later in enumerate(onsets):
            here = [fault for fault in faults if sweep.begins_later(fault) == later]
            diverges |= _size_panel(axes[row, column], sweep, here)
            onset = "from step " + _steps(sweep.known[fault].onset for fault in here) if later else "from the start"
            title = f"{_named(where)}, {onset}" if here else f"{_named(where)}: no such fault"
            axes[row, column].set_title(title, fontsize=11.5)
            axes[row, column].label_outer()
    for axis in axes[-1]:
        axis.set_xlabel("size of the fault (bits)")
        axis.xaxis.set_major_locator(FixedLocator(sorted({sweep.known[fault].bits for fault in sweep.faults})))
        axis.xaxis.set_major_formatter(PLAIN)
    for axis in axes[:, 0]:
        axis.set_ylabel("median steps from onset\nto first alarm")
    handles = _size_legend(sweep, diverges)
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.91, 0.5), frameon=False, fontsize=9.5)
    figure.suptitle(
        "How small a fault raises an alarm, and how soon",
        x=0.07, ha="left", fontsize=13, weight="bold", y=0.9 + 0.5 / figure.get_figheight(),
    )  # fmt: skip
    save(figure, path)
    return (
        "Median number of steps from a fault's onset to each detector's first alarm against its size in bits, "
        f"at {contest.experiment.alpha:.0%} false alarms per run; on the top line the median run has none by its end."
        + (" Dashed: where the loss diverges." if diverges else "")
        + (f" Grey: {', '.join(map(pretty, sweep.others))}." if sweep.others else "")
        + (f" No alarm in the median run: {', '.join(map(pretty, sweep.silent))}." if sweep.silent else "")
    )


def _size_panel(axis: plt.Axes, sweep: Sweep, faults: Sequence[str]) -> bool:
    """Delays of one place and onset; whether the median run of some of its faults diverges."""
    faults = sorted(faults, key=lambda fault: sweep.known[fault].bits)
    never = delay_axis(axis, sweep.experiment.horizon, sweep.medians.min())
    bits = np.array([sweep.known[fault].bits for fault in faults], float)
    for name in sweep.others:
        axis.plot(bits, _or_never(sweep.medians, name, faults, never), color="0.75", linewidth=1.0, zorder=1)
    count = len(sweep.looks)
    for i, (name, (colour, marker)) in enumerate(sweep.looks.items()):
        dodge = min(0.1, 0.6 / count) * (i - (count - 1) / 2)  # equal delays stand side by side
        y = _or_never(sweep.medians, name, faults, never)
        axis.plot(bits + dodge, y, color=colour, marker=marker, markersize=6.5, linewidth=1.6)
    ends = [_divergence_delay(sweep.experiment, fault) for fault in faults]
    diverges = bool(np.isfinite(ends).any())
    if diverges:
        axis.plot(bits, ends, color=ALARM, linestyle="--", linewidth=1.8)
    return diverges


def _size_legend(sweep: Sweep, diverges: bool) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6.5, label=pretty(name))
        for name, (colour, marker) in sweep.looks.items()
    ]
    if sweep.others:
        handles.append(Line2D([], [], color="0.75", linewidth=1.0, label=f"{len(sweep.others)} other monitors"))
    if diverges:
        handles.append(Line2D([], [], color=ALARM, linestyle="--", label="loss diverges"))
    return handles


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
