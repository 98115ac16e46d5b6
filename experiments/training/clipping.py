"""The clip of the gradients, and a wrong one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.faults.clip_operation import ClipOperation
from foreshock.models.corruption import Log


def clip_gradients(parameters: Sequence[nn.Parameter], clip: float | None) -> Tensor:
    """Clip the gradients to a global norm, None for no clip; the norm before, 0-dim."""
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, grad_norm)
    return grad_norm


def clip_wrongly(
    parameters: Mapping[str, nn.Parameter], clip: float, operation: ClipOperation, log: Log | None = None
) -> Tensor:
    """Clip each part of the parameters as the operation says; the global norm before, 0-dim.

    clip: the run's own. The log has the factor on each part's gradients: the healthy one before, this one after.
    """
    grad_norm = clip_gradients(list(parameters.values()), None)
    limit = operation.norm(clip)
    for part, names in operation.parts(parameters).items():
        own = clip_gradients([parameters[name] for name in names], limit)
        if log is not None:
            log.add("clip", operation, part, _factor(clip, grad_norm), _factor(limit, own))
    return grad_norm


def _factor(clip: float | None, norm: Tensor) -> Tensor:
    """What ``torch.nn.utils.clip_grads_with_norm_`` multiplies gradients by, 0-dim."""
    return torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)
