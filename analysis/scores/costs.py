"""What each monitor costs, in shares of a training step, as ``experiments.bench`` measured it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[2] / "results" / "bench-cpu.json"


@dataclass(frozen=True)
class MonitorCost:
    """What one monitor costs with its default settings.

    share_of_step: what it computes and its copies of weights, a step; every_steps: its cadences, counted as
    multiples, as jitter moves the readings of all of them together; taps: by place that it taps, what
    that adds to a step at which it reads, as a share of the step.
    """

    name: str
    share_of_step: float
    every_steps: tuple[int, ...]
    taps: Mapping[str, float]


def monitor_costs(model: str, bench: Path = BENCH) -> dict[str, MonitorCost]:
    """By signal, the cost of its monitor. model: of conf/model; empty where none was measured."""
    if not bench.exists():
        return {}
    return costs_of(json.loads(bench.read_text()).get("monitors", {}).get(model, {}))


def costs_of(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, MonitorCost]:
    """By signal, the cost of its monitor, out of the monitors of one model as the bench wrote them."""
    return {
        signal: MonitorCost(name, cost["share_of_step"], tuple(cost["every_steps"]), cost["taps"])
        for name, cost in measured.items()
        for signal in cost["signals"]
    }


def taps_share(monitors: Sequence[MonitorCost]) -> float:
    """What tapping for these monitors adds to a step, the mean over a period of their cadences.

    A place is tapped at the steps at which a monitor that taps it reads, once for all of them.
    """
    added = 0.0
    for place in {place for monitor in monitors for place in monitor.taps}:
        readers = [monitor for monitor in monitors if place in monitor.taps]
        every = {steps for monitor in readers for steps in monitor.every_steps}
        period = math.lcm(*every)
        due = sum(any(step % steps == 0 for steps in every) for step in range(period))
        added += max(monitor.taps[place] for monitor in readers) * due / period
    return added


def detector_cost(signals: Sequence[str], costs: Mapping[str, MonitorCost]) -> float:
    """Share of a step: what the monitors behind these signals take, each once, with the taps that they need.

    costs: of ``monitor_costs``. NaN where a monitor was not measured.
    """
    if not signals or any(signal not in costs for signal in signals):
        return float("nan")
    monitors = list({costs[signal].name: costs[signal] for signal in signals}.values())
    return sum(monitor.share_of_step for monitor in monitors) + taps_share(monitors)
