"""Whether a fault fits the model and the training that it is meant for."""

from __future__ import annotations

from foreshock.faults.base import Fault, Sites
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
    healthy = Sites(batch_size=train.batch_size)
    checked = {healthy}
    for step in range(fault.onset, train.steps):
        sites = fault.sites(step, healthy)
        if sites is not healthy and sites not in checked:
            sites.check_fits(model, train)
            checked.add(sites)
    if checked == {healthy} and not fault.describe().control:
        raise ValueError(f"fault: {fault} changes nothing in train.steps={train.steps}")
