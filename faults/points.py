"""The marked points of the training step: how their operations are applied, and what they changed is logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from foreshock.faults.base import Sites
from foreshock.faults.operation import BatchOperation, Moment, Places, SamplingOperation, TensorOperation
from foreshock.models.batch import IGNORED, inputs_and_targets
from foreshock.models.corruption import Log


def log_numbers(sites: Sites, healthy: Sites, step: int, rates: Mapping[str, float], log: Log) -> None:
    """Count what a fault does to the numbers of update ``step``. rates: scheduled, of every parameter group."""
    own, right = ((s.batch_size, s.data_step, s.balance_scale, s.lr_scale) for s in (sites, healthy))
    if own == right:
        return
    changes = {
        ("batch_size", "sequences"): (healthy.batch_size, sites.batch_size),
        ("data_step", "step"): (step, step if sites.data_step is None else sites.data_step),
        ("balance_scale", "factor"): (healthy.balance_scale, sites.balance_scale),
    }
    for group, rate in rates.items():
        changes["lr_scale", f"learning rate of {group}"] = (rate, rate * getattr(sites.lr_scale, group))
    for (point, name), (before, after) in changes.items():
        if before != after:
            log.add(point, "set", name, *torch.tensor([[before], [after]], dtype=torch.float64))


@torch.no_grad()
def corrupt_tensors(
    point: str,
    tensors: Mapping[str, Tensor],
    operations: Sequence[TensorOperation],
    moment: Moment,
    log: Log | None = None,
) -> None:
    """Apply the operations of one point in order, in place. point: the field of ``Sites``; tensors: by name."""
    for operation in operations:
        for name in [] if operation.idle else operation.touches(tensors):
            before = tensors[name]
            after = operation.apply(before, moment.at(point, name))
            if log is not None:
                log.add(point, operation, name, before, after)
            before.copy_(after)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Those that there are, by the names of their parameters."""
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def corrupt_starts(
    starts_B: np.ndarray, operations: Sequence[SamplingOperation], places: Places, moment: Moment, log: Log | None
) -> np.ndarray:
    """Where the sequences of a batch begin once the operations have moved them, (B,)."""
    for operation in operations:
        if not operation.idle:
            before, starts_B = starts_B, operation.apply(starts_B, places, moment)
            if log is not None:
                log.add("sampling", operation, "starts", torch.from_numpy(before), torch.from_numpy(starts_B))
    return starts_B


def corrupt_batch(
    batch_BT1: Tensor, operations: Sequence[BatchOperation], moment: Moment, log: Log | None = None
) -> Tensor:
    """A batch of tokens (B, T + 1), as it is without operations, else its inputs and targets apart, (B, 2, T)."""
    if all(operation.idle for operation in operations):
        return batch_BT1
    pair_B2T = torch.stack(inputs_and_targets(batch_BT1), dim=1)
    for operation in operations:
        if not operation.idle:
            before, after = pair_B2T, operation.apply(pair_B2T, moment)
            pair_B2T = torch.where(before == IGNORED, before, after)
            for index, name in enumerate(("inputs", "targets") if log is not None else ()):
                if name in operation.changes:
                    log.add("batch", operation, name, before[:, index], pair_B2T[:, index])  # type: ignore[union-attr]  # there is one
    return pair_B2T
