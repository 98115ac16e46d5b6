"""A training batch as inputs and targets."""

from __future__ import annotations

from torch import Tensor

IGNORED = -100
"""A target that the loss leaves out: ``ignore_index`` of PyTorch's cross entropy, whose mean is over the others."""


def inputs_and_targets(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) that a model reads, and those that it is to predict.

    batch: tokens (B, T + 1), each the target of those before it; or inputs and targets apart, (B, 2, T), where a fault
    changes one of them alone.
    """
    return (batch[:, :-1], batch[:, 1:]) if batch.ndim == 2 else (batch[:, 0], batch[:, 1])
