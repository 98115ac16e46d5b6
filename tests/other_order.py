"""Sums in another order than this machine's, as another processor's kernels would take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _halves(a: Tensor, b: Tensor, product: Any) -> Tensor:
    """a @ b, the second half of the inner sum first."""
    half = a.shape[-1] // 2
    if half == 0:
        return product(a, b)
    return product(a[..., half:], b[..., half:, :]) + product(a[..., :half], b[..., :half, :])


class OtherBatchedOrder(TorchDispatchMode):
    """While it is open, batched matrix products add up their second half first; products of two matrices do not.

    A stack of runs multiplies by batched products where a single run does not. That both round alike is one machine's
    habit, which this breaks.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is aten.bmm.default:
            return _halves(*args, aten.bmm.default)
        return function(*args, **(kwargs or {}))
