"""Old runs are read as if monitors and faults had described themselves then as they do now."""

import json
from dataclasses import asdict, replace

import pytest

from foreshock.experiments.migration import from_schema_2, with_card
from foreshock.experiments.plain_config import construct, monitors_of, read
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


def plain(card) -> dict:
    """As JSON has it."""
    return json.loads(json.dumps(card if isinstance(card, dict) else asdict(card)))


BITS = {"bits": 3, "rounding": "flip", "share": 0.5, "onset": 7, "duration": 9}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("none", {}),
        ("bf16_shift", {"sites": ["o", "do"], "phase": "backward", "layers": [1], "heads": [0, 1], **BITS}),
        ("bf16_shift", {"sites": ["o"], "bits": 0}),
        ("module_shift", {"modules": ["head"], "site": "dy", **BITS}),
        ("module_shift", {"modules": ["head"], "site": "dy", "bits": 0}),
        ("natural_bf16", {"pv_block": 8}),
        ("natural_bf16", {"pv_accumulation": "fp32", "pv_block": None}),
        ("lr_scale", {"factor": 10.0, "ramp_steps": 5, "onset": 3}),
        ("lr_scale", {"factor": 1.0}),
        ("batch_shrink", {"factor": 0.25}),
        ("batch_shrink", {"factor": 0.25, "lr_rule": "sqrt"}),
        ("aux_loss_off", {"onset": 4}),
    ],
)
def test_a_manifest_without_a_card_is_given_that_of_its_fault_today(name, changes):
    manifest = with_card({"config": {"fault": read("fault", name) | changes}})
    assert plain(manifest["injection"]) == plain(construct("fault", name, **changes).describe())


def test_the_card_of_several_faults_has_the_injections_of_each():
    parts = [read("fault", "lr_scale") | {"factor": 2.0}, read("fault", "aux_loss_off")]
    fault = {"_target_": "faults.combined.Combined", "faults": {str(i): part for i, part in enumerate(parts)}}
    card = with_card({"config": {"fault": fault}})["injection"]
    alone = [with_card({"config": {"fault": part}})["injection"]["injections"] for part in parts]
    assert card["family"] == "combined" and list(card["injections"]) == [*alone[0], *alone[1]]


def test_a_card_that_is_there_stays_and_a_fault_that_is_not_ours_has_an_empty_one():
    kept = {"config": {}, "injection": {"family": "data", "injections": []}}
    assert with_card(kept) == kept
    assert with_card({"config": {"fault": {"_target_": "mine.Mine", "bits": 3}}})["injection"]["injections"] == ()
