"""Many symmetric matrices made tridiagonal together, by Householder's reduction in Triton: two kernels a column.

With x the first column below the diagonal, v = x + sign(x_1) |x| e_1 and h = |v|^2 / 2, the reflection 1 - v v^T / h
turns x to one entry of size |x|, and the rest A to A - v w^T - w v^T, w = u - (v.u / 2h) v, u = A v / h (Golub & Van
Loan, section 8.3.1). The next reflection needs of the new A only a row; with it in hand, one pass over memory applies
w and multiplies by the next v.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128
"""A tile of the pass over memory."""


@triton.jit(do_not_specialize=["k"])
def _reflect_kernel(a, v, u, over_h, w, next_v, diagonal, squared, k, n, BLOCK: tl.constexpr):
    """Program b finishes matrix b's last w, brings its row k up to date, and makes the reflection that clears it.

    u: A v of the last reflection, not yet over h. next_v is 0 up to k; 1 / h takes the place of the last one, 0 for a
    row that is clear already.
    """
    matrix = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < n
    here = matrix * n + i
    scale = tl.load(over_h + matrix)
    v_i = tl.load(v + here, mask=inside, other=0.0)
    u_i = tl.where(i >= k, tl.load(u + here, mask=inside, other=0.0), 0.0) * scale
    w_i = u_i - v_i * (tl.sum(v_i * u_i) * scale * 0.5)
    tl.store(w + here, w_i, mask=inside)
    v_k, w_k = tl.sum(tl.where(i == k, v_i, 0.0)), tl.sum(tl.where(i == k, w_i, 0.0))
    row = tl.load(a + (matrix * n + k) * n + i, mask=inside, other=0.0) - v_k * w_i - w_k * v_i
    tl.store(diagonal + matrix * n + k, tl.sum(tl.where(i == k, row, 0.0)))
    x = tl.where(i > k, row, 0.0)
    size2 = tl.sum(x * x)
    tl.store(squared + matrix * n + k, size2)  # the last is 0
    size, first = tl.sqrt(size2), tl.sum(tl.where(i == k + 1, x, 0.0))
    tl.store(next_v + here, tl.where(i == k + 1, x + tl.where(first < 0, -size, size), x), mask=inside)
    h = size2 + size * tl.abs(first)
    tl.store(over_h + matrix, tl.where(h > 1e-300, 1.0 / h, 0.0))


@triton.jit(do_not_specialize=["k"])
def _pass_kernel(a, v, w, next_v, u, k, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (b, t) takes A - v w^T - w v^T in a tile of matrix b's rows beyond k, and those of u = A next_v."""
    matrix = tl.program_id(0).to(tl.int64)
    r = ((k + 1) // ROWS + tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    v_r = tl.load(v + matrix * n + r, mask=r < n, other=0.0)[:, None]
    w_r = tl.load(w + matrix * n + r, mask=r < n, other=0.0)[:, None]
    total = tl.zeros([ROWS], tl.float64)
    for first in range((k + 1) // COLUMNS * COLUMNS, n, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        v_c = tl.load(v + matrix * n + c, mask=c < n, other=0.0)[None, :]
        w_c = tl.load(w + matrix * n + c, mask=c < n, other=0.0)[None, :]
        next_c = tl.load(next_v + matrix * n + c, mask=c < n, other=0.0)[None, :]
        inside = (r < n)[:, None] & (c < n)[None, :]
        places = a + (matrix * n + r)[:, None] * n + c[None, :]
        tile = tl.load(places, mask=inside, other=0.0) - v_r * w_c - w_r * v_c
        tl.store(places, tile, mask=inside)
        total += tl.sum(tile * next_c, 1)
    tl.store(u + matrix * n + r, total, mask=r < n)


def tridiagonal(symmetric_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal, (B, n), and squared off-diagonal, (B, n - 1), of tridiagonal matrices with the same eigenvalues.

    FP64, n at least 2; ``symmetric_Bnn`` is overwritten.
    """
    a, (matrices, n, _) = symmetric_Bnn.contiguous(), symmetric_Bnn.shape
    diagonal, squared = a.new_empty(matrices, n), a.new_empty(matrices, n)
    v, next_v, w, u = a.new_zeros(4, matrices, n)
    over_h = a.new_zeros(matrices)
    block = triton.next_power_of_2(n)
    for k in range(n):
        _reflect_kernel[(matrices,)](a, v, u, over_h, w, next_v, diagonal, squared, k, n, BLOCK=block)
        if k < n - 1:
            tiles = triton.cdiv(n, ROWS) - (k + 1) // ROWS
            _pass_kernel[(matrices, tiles)](a, v, w, next_v, u, k, n, ROWS=ROWS, COLUMNS=COLUMNS)
        v, next_v = next_v, v
    return diagonal, squared[:, :-1]
