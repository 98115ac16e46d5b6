"""The training objective as a function of the weights, for those who ask what it would be elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from models.corruption import Corrupted, ModuleFault
from models.numerics import AttentionNumerics
from models.transformer import Transformer


class _Objective(nn.Module):
    """``functional_call`` calls a module; this one's ``forward`` is the sum of a model's two terms."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT1: Tensor, numerics: AttentionNumerics, balance_scale: float) -> Tensor:
        loss, auxiliary, _ = self.model.objective(tokens_BT1, numerics, balance_scale)
        return loss + auxiliary


def objective_at(
    model: Transformer,
    tokens_BT1: Tensor,
    numerics: AttentionNumerics,
    modules: Collection[ModuleFault],
    balance_scale: float,
    weights: Mapping[str, Tensor],
) -> Tensor:
    """What training minimises on this batch and kernel, NLL plus auxiliary losses in nats, at other weights.

    weights: by the model's parameter names, all of them; tied ones once. numerics, modules: the step's faults; one on
    the gradient of a weight is left out. The model keeps its parameters, their ``grad`` and its buffers: the counters
    that a faulty kernel adds to are copies. Returns a 0-dim tensor, differentiable in ``weights`` as often as the
    attention backend is.
    """
    tensors = {f"model.{name}": weight for name, weight in weights.items()}
    tensors |= {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    with Corrupted(model, [fault for fault in modules if fault.site != "dw"]):
        return torch.func.functional_call(_Objective(model), tensors, (tokens_BT1, numerics, balance_scale))
