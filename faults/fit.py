"""Whether a fault fits the model and the training that it is meant for."""

from __future__ import annotations

from foreshock.faults.base import Fault, Sites, WindowedFault
from foreshock.faults.combined import Combined
from foreshock.faults.mx_linear import BlockProducts
from foreshock.faults.operation import Training
from foreshock.faults.recomputation import Recomputation
from foreshock.models.moe import GroupedLinear
from foreshock.models.transformer import TransformerConfig, skeleton


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
            _check_recomputed(sites, model)
            checked.add(sites)
        _check_past(step, sites)
    if checked == {healthy} and not fault.describe().control:
        raise ValueError(f"fault: {fault} changes nothing in train.steps={train.steps}")


def _check_recomputed(sites: Sites, model: TransformerConfig) -> None:
    """Raise ValueError for block products of experts in a block whose second forward gives them other tokens."""
    redrawn = [change for change in sites.modules if isinstance(change, Recomputation) and not change.same]
    products = [form for form in sites.formats if isinstance(form, BlockProducts) and not form.idle]
    if not redrawn or not products:
        return
    whole = skeleton(model)
    recomputed = [block for change in redrawn for _, block in change.find(whole)]
    for form in products:
        for name, layer in form.find(whole).items():
            if isinstance(layer, GroupedLinear) and any(layer in block.modules() for block in recomputed):
                raise ValueError(
                    f"fault: {form} cannot multiply by {name!r} under dropout_mismatch with fault.same=false: the "
                    "second forward gives each expert other tokens; leave experts out of fault.modules, or their "
                    "layer out of fault.layers"
                )


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
