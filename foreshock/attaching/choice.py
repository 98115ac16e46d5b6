"""Which monitors a model can have, and why it cannot have the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from foreshock.alarms.overflow import is_enabled
from foreshock.experiments.plain_config import CONF, construct, read
from foreshock.models.anatomies.structure import nearest
from foreshock.models.anatomy import Anatomy
from foreshock.monitors.base import Monitor

OF_THE_LOOP = ("loss", "loss_scale", "tokens")
"""Monitors that read neither weights nor gradients."""


def configured(patterns: Sequence[str], every_steps: int | None) -> dict[str, Monitor]:
    """The monitors of ``conf/monitor`` that match, by name; every_steps: in place of a cadence that may be longer.

    Raises ValueError for a pattern that matches none, with the nearest name.
    """
    every = sorted(path.stem for path in (CONF / "monitor").glob("*.yaml"))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ValueError(f"monitors: {pattern!r} matches none of {', '.join(every)}{nearest(pattern, every)}")
    names = [name for name in every if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if every_steps is not None and every_steps > 1 and not any(_cadence(name, every_steps) for name in names):
        raise ValueError(f"every_steps={every_steps} has no effect: every step is read by {', '.join(names)}")
    return {name: construct("monitor", name, **_cadence(name, every_steps)) for name in names}


def configuration(names: Sequence[str], every_steps: int | None) -> dict[str, dict[str, Any]]:
    """The nodes that ``configured`` has built these from, for a manifest."""
    return {name: read("monitor", name) | _cadence(name, every_steps) for name in names}


def _cadence(name: str, every_steps: int | None) -> dict[str, int]:
    every_step = read("monitor", name)["every_steps"] == 1
    return {} if every_steps is None or every_step else {"every_steps": every_steps}


def declined(
    monitors: Mapping[str, Monitor], anatomy: Anatomy, optimizer: torch.optim.Optimizer, scaler: Any = None
) -> dict[str, str]:
    """By monitor, what it needs and the model, the optimizer or the loop, with its GradScaler, does not have."""
    sharded = next((name for name, p in anatomy.model.named_parameters() if is_sharded(p)), None)
    reasons = {name: _reason(monitor, anatomy, optimizer, scaler) for name, monitor in monitors.items()}
    if sharded is not None:
        hidden = f"parameters such as {sharded} are DTensors (FSDP2): no rank has them whole"
        reasons |= {name: reasons[name] or hidden for name in monitors if name not in OF_THE_LOOP}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a DTensor, told by its class's name: what it is of need not be there to import."""
    return any(cls.__name__ == "DTensor" for cls in type(parameter).__mro__)


def _reason(monitor: Monitor, anatomy: Anatomy, optimizer: torch.optim.Optimizer, scaler: Any) -> str | None:
    needs = monitor.needs
    if "scaling" in needs.view and not is_enabled(scaler):
        return "no GradScaler scales the loss: give attach(scaler=...) that of the training, if it has one"
    if needs.oracle:
        return "an oracle: it reads what an injected fault does"
    role = needs.lacking(anatomy)
    if role is not None:
        return f"the model has no {role!r}" + ("" if role != "router" else ": it is dense, or its router is not known")
    if "optimizer" in needs.view and "betas" not in optimizer.param_groups[0]:
        return f"{type(optimizer).__name__} keeps no second moment of the gradients, as Adam does"
    if "dot_product" in needs.taps and any(block.attention is None for block in anatomy.blocks):
        return "no module of a block is known to call attention"
    if set(needs.taps) & {"dot_product", "linear", "norm"} and not anatomy.blocks:
        return "the model has no blocks that are known"
    return None
