"""Runs of schema 2 are read as if their monitors had described their signals then as they do now."""

from dataclasses import asdict, replace

import pytest

from foreshock.experiments.migration import from_schema_2
from foreshock.experiments.plain_config import construct, monitors_of
from foreshock.experiments.training.run_writer import HELD_OUT
from foreshock.monitors.signal import EXACT, LEVEL, Signal, read_signal

EVERY_MONITOR = [
    HELD_OUT,
    *(signal for monitor in monitors_of(experts=True).values() for signal in monitor.signals),
    *construct("monitor", "delta_w", windows=(7,)).signals,
]


def in_schema_2(signal: Signal) -> dict:
    known = {key: value for key, value in asdict(signal).items() if key in ("name", "unit", "bad", "every_steps")}
    return known | {"axes": list(signal.axes), "constant_when_healthy": signal.kind == EXACT}


def described(signal: dict) -> Signal:
    manifest = from_schema_2({"schema": 2, "run_id": "r", "signals": {signal["name"]: signal}})
    assert manifest["schema"] == 3 and manifest["run_id"] == "r"
    return read_signal(manifest["signals"][signal["name"]])


def test_every_signal_is_described_as_its_monitor_does():
    """But for counters, which the tables of those runs declined, and still do."""
    for signal in EVERY_MONITOR:
        expected = replace(signal, kind=LEVEL) if signal.kind == EXACT else signal
        assert described(in_schema_2(signal)) == expected


def test_a_signal_of_no_monitor_of_ours_keeps_what_it_said():
    mine = described({"name": "mine.q", "unit": "1", "bad": "up", "axes": ["layer"], "every_steps": 5})
    assert mine == Signal("mine.q", "1", "up", ("layer",), 5) and mine.family == "unknown"


def test_a_description_of_something_else_is_refused():
    with pytest.raises(ValueError, match="signal mine: bad='sideways'"):
        described({"name": "mine", "unit": "1", "bad": "sideways", "axes": [], "every_steps": 5})
