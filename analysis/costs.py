"""What each monitor costs, in shares of a training step, as ``experiments.bench`` measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent / "results" / "bench-cpu.json"


def monitor_costs(model: str, bench: Path = BENCH) -> dict[str, tuple[str, float]]:
    """By signal, its monitor and the share of a step that the monitor takes with its default settings.

    model: of conf/model; empty where none was measured.
    """
    if not bench.exists():
        return {}
    measured: Mapping[str, Any] = json.loads(bench.read_text()).get("monitors", {}).get(model, {})
    return {signal: (name, one["share_of_step"]) for name, one in measured.items() for signal in one["signals"]}


def detector_cost(signals: Sequence[str], costs: Mapping[str, tuple[str, float]]) -> float:
    """Share of a step: what the monitors behind these signals take, each once. NaN where one was not measured.

    costs: of ``monitor_costs``.
    """
    if not signals or any(signal not in costs for signal in signals):
        return float("nan")
    return float(sum(dict(costs[signal] for signal in signals).values()))
