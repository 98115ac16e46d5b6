"""Manifests of schema versions 2 and 3 as version 4 has them. Needs no torch.

In version 3 every signal was read at multiples of its cadence, and no manifest said so.

Version 2 said of a signal its name, unit, bad direction, axes and cadence, and whether it stays put in health. What
version 3 says beyond that is in ``signals_of_schema_2.json``, written from the monitors' declarations: by the signal's
name, without the window that a configuration chose, what differs from the defaults of ``Signal``. A signal that stays
put in health was declined on the reference track; it still is, as a ``level`` without spread, and not judged ``exact``:
the tables of old runs stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

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
