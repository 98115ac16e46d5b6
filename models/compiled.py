"""The training objective through ``torch.compile``, for micro-batches that nobody looks into.

A compiled forward fuses what stands between matrix products: it keeps in registers, in FP32, what the eager model
stores in BF16, and adds in another order. So it is not the same arithmetic as the eager one, bit for bit, and a step
must not change with who watches it. Nor can hooks reach inside it. Both are settled by what is compiled: of every
update all micro-batches but the last, whether or not the last is watched. Taps see the last, which is eager and
trains like the others; so a monitor changes no bit, and pays no second pass.

Attention's dot product is never compiled: faults live in it, and a compiler may remove the very rounding that they
are (FP32 to BF16 and back). The graph breaks there, once a layer. Faults of other modules are hooks and are refused
with ``train.compile`` (``experiments.build``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from models.transformer import Attention, Transformer


def compiled_objective(model: Transformer, backend: str = "inductor") -> Callable[..., Any]:
    """``model.objective``, compiled for each shape that it meets; the model itself stays eager.

    Its losses agree with the eager ones to the rounding of the model's precision. backend: of ``torch.compile``;
    ``inductor`` needs a C++ compiler on a CPU and Triton on a GPU.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = torch.compiler.disable(module.attend)
    return torch.compile(model.objective, dynamic=False, backend=backend)
