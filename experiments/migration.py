"""A manifest of before, of schema version 2 or 3, as version 4 has it. Needs no torch.

In version 3 every signal was read at multiples of its cadence, and no manifest said so.

Version 2 said of a signal its name, unit, bad direction, axes and cadence, and whether it stays put in health. What
version 3 says beyond that is in ``signals_of_schema_2.json``, written from the monitors' declarations: by the signal's
name, without the window that a configuration chose, what differs from the defaults of ``Signal``. A signal that stays
put in health was declined on the reference track; it still is, as a ``level`` without spread, and not judged ``exact``:
the tables of old runs stay as they are.

Before there were injection cards a manifest said of the fault its configuration alone. It is given the card that the
fault's class has today.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from foreshock.faults.card import Injection, InjectionCard
from foreshock.faults.window import Window
from foreshock.monitors.signal import read_signal

ADDITIONS = Path(__file__).with_name("signals_of_schema_2.json")
WINDOW = re.compile(r"\.w\d+$")


def from_schema_2(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of version 3: its signals described anew. Raises TypeError, ValueError or KeyError on others."""
    signals = {name: _described(name, signal) for name, signal in manifest["signals"].items()}
    return {**manifest, "schema": 3, "signals": signals}


def from_schema_3(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of version 4: signals are read at multiples of their cadence. Raises TypeError on others."""
    signals = {name: {**signal, "jittered": False} for name, signal in manifest["signals"].items()}
    return {**manifest, "schema": 4, "signals": signals}


@lru_cache(maxsize=1)
def _additions() -> Mapping[str, Mapping[str, Any]]:
    return json.loads(ADDITIONS.read_text())


def _described(name: str, signal: Mapping[str, Any]) -> dict[str, Any]:
    said = {key: value for key, value in signal.items() if key != "constant_when_healthy"}
    whole = asdict(read_signal({"name": name, **said, **_additions().get(WINDOW.sub("", name), {})}))
    return whole | {"axes": list(whole["axes"])}  # as JSON has it


Node = Mapping[str, Any]


def with_card(manifest: Node) -> dict[str, Any]:
    """The manifest with an injection card, where it has none."""
    if "injection" in manifest:
        return dict(manifest)
    return {**manifest, "injection": asdict(_card(manifest["config"].get("fault") or {}))}


def _card(fault: Node) -> InjectionCard:
    """The card of a fault's configuration; an empty one for a class that is not the project's."""
    describe = CARDS.get(str(fault.get("_target_", "")).rpartition(".")[2])
    return InjectionCard("other") if describe is None else describe(fault)


def _window(fault: Node) -> Window:
    return Window(fault["onset"], fault.get("duration"), fault.get("every", 1))


def _bf16_shift(fault: Node) -> InjectionCard:
    reach = {"phase": fault["phase"], "layers": fault["layers"], "heads": fault["heads"]}
    where = {"point": "numerics", "tensors": fault["sites"], **reach}
    return InjectionCard("attention_numerics", (_bits(fault, where),))


def _module_shift(fault: Node) -> InjectionCard:
    where = {"point": "modules", "modules": fault["modules"], "tensor": fault["site"]}
    return InjectionCard("module_numerics", (_bits(fault, where),))


def _bits(fault: Node, where: Node) -> Injection:
    size = {"bits": fault["bits"], "share": fault.get("share", 1.0)}
    return Injection(fault["rounding"], where, size, _window(fault), control=fault["bits"] == 0)


ORDINARY = {
    "pv_accumulation": "fp32",
    "pv_block": None,
    "stored_o": "bf16",
    "delta": "o",
    "row_max": "plain",
    "beta": None,
    "offset": None,
}
"""Attention's arithmetic without a fault."""


def _natural_bf16(fault: Node) -> InjectionCard:
    where = {"point": "numerics", "tensors": (), "phase": "both", "layers": None, "heads": None}
    size = {key: fault[key] for key in ORDINARY}
    injection = Injection("arithmetic", where, size, _window(fault), control=size == ORDINARY)
    return InjectionCard("attention_numerics", (injection,))


def _lr_scale(fault: Node) -> InjectionCard:
    where = {"point": "lr_scale", "groups": fault.get("groups")}
    size = {"factor": fault["factor"], "ramp_steps": fault["ramp_steps"]}
    return InjectionCard("schedule", (Injection("scale", where, size, _window(fault), fault["factor"] == 1),))


def _batch_shrink(fault: Node) -> InjectionCard:
    size, window, control = {key: fault[key] for key in ("factor", "batch_size")}, _window(fault), fault["factor"] == 1
    shrunk = Injection("shrink", {"point": "batch_size"}, size, window, control)
    exponent = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[fault.get("lr_rule", "none")]
    if exponent == 0:
        return InjectionCard("schedule", (shrunk,))
    where, size = {"point": "lr_scale", "groups": None}, {"exponent_of_batch": exponent}
    return InjectionCard("schedule", (shrunk, Injection("scale", where, size, window, control)))


def _aux_loss_off(fault: Node) -> InjectionCard:
    injection = Injection("scale", {"point": "balance_scale"}, {"factor": 0.0}, _window(fault))
    return InjectionCard("experts", (injection,))


def _combined(fault: Node) -> InjectionCard:
    return InjectionCard("combined", tuple(i for part in fault["faults"].values() for i in _card(part).injections))


def _no_fault(fault: Node) -> InjectionCard:
    return InjectionCard("healthy")


CARDS: Mapping[str, Callable[[Node], InjectionCard]] = {
    "NoFault": _no_fault,
    "BF16Shift": _bf16_shift,
    "ModuleShift": _module_shift,
    "NaturalBF16": _natural_bf16,
    "LRScale": _lr_scale,
    "BatchShrink": _batch_shrink,
    "AuxLossOff": _aux_loss_off,
    "Combined": _combined,
}
"""By the class of a fault of before there were cards, what it does."""
