"""Eigenvalues of symmetric tridiagonal matrices by bisection, in Triton: every eigenvalue of every matrix at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Eigenvalues of one program."""

HALVINGS = 58
"""Of an interval that holds all eigenvalues: to the last bit of the largest."""


@triton.jit
def _bisection_kernel(diagonal, squared, low, high, values, n, HALVINGS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (b, c) finds eigenvalues c BLOCK to (c + 1) BLOCK of matrix b, counted from the smallest.

    The number of eigenvalues below x is that of negative pivots q_i = d_i - x - e_(i-1)^2 / q_(i-1) (Sturm; Barth,
    Martin & Wilkinson 1967). A pivot of 0 is taken as a tiny negative one.
    """
    matrix = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lower = tl.load(low + matrix) + tl.zeros([BLOCK], tl.float64)
    upper = tl.load(high + matrix) + tl.zeros([BLOCK], tl.float64)
    for _ in range(HALVINGS):
        middle = (lower + upper) * 0.5
        pivot = tl.load(diagonal + matrix * n) - middle
        pivot = tl.where(pivot == 0, -1e-300, pivot)
        below = (pivot < 0).to(tl.int32)
        for i in range(1, n):
            ratio = tl.load(squared + matrix * (n - 1) + i - 1) / pivot
            pivot = tl.load(diagonal + matrix * n + i) - middle - ratio
            pivot = tl.where(pivot == 0, -1e-300, pivot)
            below += (pivot < 0).to(tl.int32)
        lower = tl.where(below <= index, middle, lower)
        upper = tl.where(below <= index, upper, middle)
    tl.store(values + matrix * n + index, (lower + upper) * 0.5, mask=index < n)


def tridiagonal_eigenvalues(diagonal: Tensor, squared: Tensor) -> Tensor:
    """Ascending eigenvalues, (B, n), FP64, of matrices with these diagonals, (B, n), and squared off-diagonals.

    squared: (B, n - 1), finite as ``diagonal`` is. Off by about 1e-16 of the largest magnitude, as LAPACK's are.
    """
    off = torch.nn.functional.pad(squared.sqrt(), (1, 1))
    radius = off[:, 1:] + off[:, :-1]  # Gershgorin
    low, high = (diagonal - radius).amin(-1), (diagonal + radius).amax(-1)
    values = torch.empty_like(diagonal)
    matrices, n = diagonal.shape
    _bisection_kernel[(matrices, triton.cdiv(n, BLOCK))](
        diagonal.contiguous(), squared.contiguous(), low, high, values, n, HALVINGS=HALVINGS, BLOCK=BLOCK, num_warps=2
    )
    return values
