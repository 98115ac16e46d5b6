"""BF16 or FP16 autocast over FP32 weights: where it begins, and what inside it keeps its own precision.

``bf16`` is mixed precision as Micikevicius et al., arXiv:1710.03740, with BF16's range in place of loss scaling: matrix
products take and return BF16 and accumulate in FP32; weights, their gradients, AdamW, the residual stream, norms,
softmax and loss are FP32. ``fp16`` is the same in FP16, whose range needs loss scaling
(``experiments.training.loss_scaler``). Three places need more than ``torch.autocast`` does by itself. Attention's dot
product is a kernel with an arithmetic of its own, which receives BF16 or FP16 and is left alone (``Attention.attend``):
a backend with fault sites stores BF16 inside in either case, as it does in FP32, and ``sdpa`` what it receives. A
router's logits decide where tokens go and stay FP32 (Switch Transformer, arXiv:2101.03961 section 2.4). A grouped
product is unknown to autocast, and its inputs are cast by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""In which matrix products take and return their tensors."""
PRECISIONS = tuple(DTYPES)


def in_own_precision(run: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a model's forward, whose first argument is a tensor, so that it runs in ``self.precision``."""

    @functools.wraps(run)
    def wrapper(self: Any, tokens: Tensor, *arguments: Any) -> Any:
        if self.precision == "fp32":
            return run(self, tokens, *arguments)
        with torch.autocast(tokens.device.type, DTYPES[self.precision]):
            return run(self, tokens, *arguments)

    return wrapper


def outside_autocast(x: Tensor) -> AbstractContextManager:
    """While it is open, operations on x's device take their inputs as they are."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def accumulate_in_fp32() -> None:
    """Of this process: let no GPU add up the parts of a split BF16 or FP16 product in that format, as PyTorch does.

    Every product is then rounded once, as ``monitors.autocast_rounding`` predicts.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, as a matrix product would take them; else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
