"""What the monitors of ``conf/`` say of their signals, for made-up runs."""

from dataclasses import asdict, replace
from typing import Any

from foreshock.experiments.plain_config import monitors_of
from foreshock.monitors.signal import Signal

DECLARED: dict[str, Signal] = {
    signal.name: signal for monitor in monitors_of(experts=True).values() for signal in monitor.signals
}


def described(name: str, every_steps: int = 10, **changes: Any) -> dict[str, Any]:
    """A signal as a manifest has it, with another cadence and other changes."""
    return asdict(replace(DECLARED[name], every_steps=every_steps, **changes))
