"""Whether a fault fits the model and the training that it is meant for."""

from __future__ import annotations

from foreshock.faults.base import Fault, Sites, WindowedFault
from foreshock.faults.combined import Combined
from foreshock.faults.operation import Training
from foreshock.models.transformer import TransformerConfig


def check_fits(fault: Fault, model: TransformerConfig, train: Training) -> None:
    """Raise ValueError where fault, model and length do not fit together, at whichever step that shows.

    A fault that is no declared control and whose steps are all healthy is refused too.
    """
    if fault.onset is None:
        return
    for member in fault.faults.values() if isinstance(fault, Combined) else ():
        check_fits(member, model, train)
    if fault.onset >= train.steps:
        raise ValueError(f"fault.onset={fault.onset} is after the end: train.steps={train.steps}")
    _check_windows(fault, train)
    if isinstance(fault, WindowedFault) and not fault.describe().control:
        fault.check_begins(train)
    healthy = Sites(batch_size=train.batch_size)
    checked = {healthy}
    for step in range(fault.onset, train.steps):
        sites = fault.sites(step, healthy)
        if sites is not healthy and sites not in checked:
            sites.check_fits(model, train)
            checked.add(sites)
        _check_past(step, sites)
    if checked == {healthy} and not fault.describe().control:
        raise ValueError(f"fault: {fault} changes nothing in train.steps={train.steps}")


def _check_past(step: int, sites: Sites) -> None:
    """Raise ValueError for an operation that reads what was before the run."""
    for value in sites.values:
        lookback = 0 if getattr(value, "idle", True) else getattr(value, "lookback_steps", 0)  # of an operation
        if lookback > step:
            raise ValueError(
                f"fault.onset is too early: at step {step} {value} reads {lookback} steps back, before the run began; "
                f"the first faulty update is allowed from {lookback}"
            )


def _check_windows(fault: Fault, train: Training) -> None:
    """Raise ValueError for a period that the run does not hold once, or one whose faulty update is after its end."""
    for window in {injection.window for injection in fault.describe().injections}:
        if window.every > train.steps:
            raise ValueError(f"fault.every={window.every} is longer than the run: train.steps={train.steps}")
        if window.first >= train.steps:
            raise ValueError(
                f"fault.window_phase={window.phase} is not allowed: the first faulty update, {window.onset} + "
                f"{window.phase}, is after the end: train.steps={train.steps}"
            )
