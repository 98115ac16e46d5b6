"""One call of attention's dot product: which kernel ran, with what scale and mask, and what it received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.models.numerics import to_bf16_grid
from foreshock.models.tiles import Tiles

REFERENCE, TRITON, SDPA = "reference", "triton", "sdpa"
"""Backends of ``models.attention``."""
TORCH_FLASH, TORCH_OTHER, EAGER, CUSTOM = "PyTorch's flash", "PyTorch's other", "eager", "custom"
"""Kernels of other models: of ``scaled_dot_product_attention``, of two products with a softmax between, or a stranger's
that its owner has wrapped (``foreshock.watched_attention``)."""


@dataclass(frozen=True)
class AttentionCall:
    """What is known of a call. Tensors are those of its tap.

    kernel: its name; window: how many keys a query sees, its own the last, None for all before it; scale: of q k^T,
    None for 1 / sqrt(D); dtype: in which the kernel multiplied, None where its name says that; tiles: of ``triton``.
    unreadable: why its scores cannot be computed again, such as a mask of padding; dropout: of P; None and 0 in a call
    that the laws are about.
    """

    kernel: str
    window: int | None = None
    scale: float | None = None
    dtype: torch.dtype | None = None
    tiles: Tiles | None = None
    unreadable: str | None = None
    dropout: float = 0.0

    @classmethod
    def of_module(cls, module: nn.Module) -> AttentionCall:
        """Of a ``models.attention.DotProduct``."""
        dot_product: Any = module
        return cls(dot_product.backend, dot_product.window, tiles=dot_product.tiles)

    def stored(self, x: Tensor) -> Tensor:
        """x as the kernel received it, in its own dtype."""
        if self.dtype is not None:
            return x.to(self.dtype).to(x.dtype)
        return x if self.kernel == SDPA else to_bf16_grid(x)

    @property
    def obstacle(self) -> str | None:
        """Why no law of attention can be read of it, or None."""
        return self.unreadable or (f"dropout {self.dropout} acts on P" if self.dropout else None)
