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


def _onto(added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta added + alpha a @ b, the second half of the inner sum first."""
    half, onto = a.shape[-1] // 2, aten.baddbmm.default
    later = onto(added, a[..., half:], b[..., half:, :], beta=beta, alpha=alpha)
    return onto(later, a[..., :half], b[..., :half, :], beta=1, alpha=alpha)


class OtherBatchedOrder(TorchDispatchMode):
    """While it is open, batched matrix products add up their second half first; products of two matrices do not.

    A stack of runs multiplies by batched products where a single run does not. That both round alike is one machine's
    habit, which this breaks.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is aten.bmm.default:
            return _halves(*args, aten.bmm.default)
        if function is aten.baddbmm.default:
            added, a, b = args
            return function(added, a, b, **(kwargs or {})) if a.shape[-1] < 2 else _onto(added, a, b, **(kwargs or {}))
        return function(*args, **(kwargs or {}))
