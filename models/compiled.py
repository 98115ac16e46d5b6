"""The training objective through ``torch.compile``, for micro-batches that nobody looks into.

A compiled forward fuses what stands between matrix products: it keeps in registers, in FP32, what the eager model
stores in BF16, and adds in another order. So it is not the same arithmetic as the eager one, bit for bit, and a step
must not change with who watches it. Nor can hooks reach inside it. Both are settled by what is compiled: of every
update all micro-batches but the last, whether or not the last is watched. Taps see the last, which is eager and
trains like the others; so a monitor changes no bit, and pays no second pass. ``train.watched_sequences`` keeps it
small.

Compiled are what stands before and after attention in each block, all of one shape by the same code, and the loss.
Attention's dot product is not: faults live in it, and a compiler may remove the very rounding that they are (FP32 to
BF16 and back). So a fault that begins or ends compiles nothing anew. Faults of other modules are hooks and are refused
with ``train.compile`` (``experiments.build``).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from foreshock.models.transformer import Block, Transformer


def _before_attention(block: Block, x_BTE: Tensor) -> tuple[Tensor, ...]:
    """Laid out head by head, as a kernel leaves the gradients: a graph copies those that come in another layout."""
    return tuple(part.contiguous() for part in Block.before_attention(block, x_BTE))


class CompiledObjective:
    """``model`` with compiled blocks and loss; the model itself stays eager.

    Its losses agree with the eager ones to the rounding of the model's precision. One compilation a shape of a
    micro-batch: two, where the last of them gives up its watched sequences.
    backend: of ``torch.compile``; ``inductor`` needs a C++ compiler on a CPU and Triton on a GPU.
    """

    def __init__(self, model: Transformer, backend: str = "inductor") -> None:
        self._model = model
        parts: list[tuple[torch.nn.Module, str, Any]] = [(model, "mean_nll", model.mean_nll)]
        for block in model.blocks:
            parts += [
                (block, "before_attention", MethodType(_before_attention, block)),
                (block, "after_attention", block.after_attention),
            ]
        self._compiled = [
            (owner, name, torch.compile(part, dynamic=False, fullgraph=True, backend=backend))
            for owner, name, part in parts
        ]

    def __call__(self, *arguments: Any) -> Any:
        for owner, name, compiled in self._compiled:
            setattr(owner, name, compiled)
        try:
            return self._model(*arguments)
        finally:
            for owner, name, _ in self._compiled:
                delattr(owner, name)
