"""``monitors.eigenvalues.tridiagonal`` in one Triton kernel, for matrices that fit a program's registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WIDEST = 128
"""In FP64 128 KiB, half of a multiprocessor's registers."""


@triton.jit
def _tridiagonal_kernel(symmetric, diagonal, squared, n, BLOCK: tl.constexpr):
    """Program b reduces matrix b; rows and columns that are done, or beyond n, count as zeros of v and w."""
    matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < n
    places = symmetric + matrix * n * n + i[:, None] * n + i[None, :]
    a = tl.load(places, mask=inside[:, None] & inside[None, :], other=0.0)
    for k in range(n):
        column = tl.sum(tl.where(i[None, :] == k, a, 0.0), 1)
        tl.store(diagonal + matrix * n + k, tl.sum(tl.where(i == k, column, 0.0)))
        x = tl.where(i > k, column, 0.0)
        size2 = tl.sum(x * x)
        tl.store(squared + matrix * n + k, size2)  # the last is 0
        size, first = tl.sqrt(size2), tl.sum(tl.where(i == k + 1, x, 0.0))
        v = tl.where(i == k + 1, x + tl.where(first < 0, -size, size), x)
        h = size2 + size * tl.abs(first)
        over_h = tl.where(h > 1e-300, 1.0 / h, 0.0)
        u = tl.where(i > k, tl.sum(a * v[None, :], 1), 0.0) * over_h
        w = u - v * (tl.sum(v * u) * over_h * 0.5)
        a -= v[:, None] * w[None, :] + w[:, None] * v[None, :]


def tridiagonal_in_registers(symmetric_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """As ``tridiagonal``, n up to ``WIDEST``; the argument is left as it is."""
    matrices, n, _ = symmetric_Bnn.shape
    diagonal, squared = (symmetric_Bnn.new_empty(matrices, n) for _ in range(2))
    block = max(16, triton.next_power_of_2(n))
    _tridiagonal_kernel[(matrices,)](
        symmetric_Bnn.contiguous(), diagonal, squared, n, BLOCK=block, num_warps=max(1, block * block // 1024)
    )
    return diagonal, squared[:, :-1]
