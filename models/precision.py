"""BF16 autocast over FP32 weights: where it begins, and what inside it keeps its own precision.

``bf16`` is mixed precision as Micikevicius et al., arXiv:1710.03740, with BF16's range in place of loss scaling: matrix
products take and return BF16 and accumulate in FP32; weights, their gradients, AdamW, the residual stream, norms,
softmax and loss are FP32. Three places need more than ``torch.autocast`` does by itself. Attention's dot product is a
kernel with an arithmetic of its own, which receives BF16 and is left alone (``Attention.attend``). A router's logits
decide where tokens go and stay FP32 (Switch Transformer, arXiv:2101.03961 section 2.4). A grouped product is unknown to
autocast, and its inputs are cast by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16")


def in_own_precision(run: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a model's forward, whose first argument is a tensor, so that it runs in ``self.precision``."""

    @functools.wraps(run)
    def wrapper(self: Any, tokens: Tensor, *arguments: Any) -> Any:
        if self.precision == "fp32":
            return run(self, tokens, *arguments)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            return run(self, tokens, *arguments)

    return wrapper


def outside_autocast(x: Tensor) -> AbstractContextManager:
    """While it is open, operations on x's device take their inputs as they are."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def accumulate_in_fp32() -> None:
    """Of this process: let no GPU add up the parts of a split BF16 product in BF16, which PyTorch allows by default.

    Every product is then rounded once, as ``monitors.autocast_rounding`` predicts.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as a matrix product would take them; else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
