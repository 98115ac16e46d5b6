"""The marked points of the training step: how their operations are applied, and what they changed is logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from foreshock.faults.operation import Moment, TensorOperation
from foreshock.models.batch import inputs_and_targets
from foreshock.models.corruption import Log


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


def corrupt_batch(
    batch_BT1: Tensor, operations: Sequence[TensorOperation], moment: Moment, log: Log | None = None
) -> Tensor:
    """A batch of tokens (B, T + 1), as it is without operations, else its inputs and targets apart, (B, 2, T)."""
    if all(operation.idle for operation in operations):
        return batch_BT1
    pair_B2T = torch.stack(inputs_and_targets(batch_BT1), dim=1)
    corrupt_tensors("batch", {"inputs": pair_B2T[:, 0], "targets": pair_B2T[:, 1]}, operations, moment, log)
    return pair_B2T
