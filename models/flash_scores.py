"""The scores of ``models.flash``, and the maximum of a row of them that moves where it repeats."""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models import arithmetic
from foreshock.models.flash_bits import product
from foreshock.models.flash_sites import K, S, corrupt, operation
from foreshock.models.flash_tiles import LOG2_E, load_tile, sees

ROUNDS_TO_ONE = tl.constexpr(arithmetic.ROUNDS_TO_ONE)


@triton.jit
def base_2(SCALE: tl.constexpr, FAULTS: tl.constexpr):
    """What turns ``scores`` into powers of 2. Their callers multiply where they subtract, which is one instruction."""
    return LOG2_E if operation(FAULTS, S) else SCALE * LOG2_E


@triton.jit
def scores(
    qk,
    i,
    j,
    T,
    seen,
    head,
    faults_ptr,
    nonfinite_ptr,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """S of a tile in units of 1 / ``base_2``, corrupted on ``s``, -inf where a query does not look. qk: Q K^T."""
    s = qk
    if operation(FAULTS, S):
        s = corrupt(qk * SCALE, i, j, T, seen, head, S, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _base_2_scores_of_keys(
    q,
    i,
    first,
    k_ptr,
    T,
    head,
    kv_head,
    faults_ptr,
    ahead,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
):
    cols, dims = first + tl.arange(0, COLS), tl.arange(0, BLOCK_D)[None, :]
    j, inside = cols[None, :], (cols[:, None] < T) & (dims < D)
    k = load_tile(k_ptr, cols, T, D, BLOCK_D)
    k = corrupt(k, cols[:, None], dims, D, inside, kv_head, K, FAULTS, faults_ptr, HEADS)
    seen = sees(i, j, T, WINDOW, ahead)
    s = scores(product(q, tl.trans(k)), i, j, T, seen, head, faults_ptr, None, SCALE, HEADS, FAULTS, True)
    return s * base_2(SCALE, FAULTS)


@triton.jit
def moved_maximum(
    q,
    first_row,
    start,
    stop,
    k_ptr,
    T,
    head,
    kv_head,
    faults_ptr,
    ahead,
    BETA: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """What ``row_max=dynamic`` subtracts from each row, base 2: its maximum m, or BETA m or 0 where m repeats.

    Keys are read twice, because which scores count as repeats is known only with m; so any tiles give the same rows.
    """
    i = first_row + tl.arange(0, ROWS)[:, None]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(start, stop, COLS):
        s = _base_2_scores_of_keys(
            q, i, first, k_ptr, T, head, kv_head, faults_ptr, ahead, SCALE, WINDOW, D, BLOCK_D, COLS, HEADS, FAULTS
        )
        top = tl.maximum(top, tl.max(s, 1))
    repeats = tl.zeros([ROWS], tl.int32)
    for first in range(start, stop, COLS):
        s = _base_2_scores_of_keys(
            q, i, first, k_ptr, T, head, kv_head, faults_ptr, ahead, SCALE, WINDOW, D, BLOCK_D, COLS, HEADS, FAULTS
        )
        repeats += tl.sum((s >= top[:, None] + ROUNDS_TO_ONE * LOG2_E).to(tl.int32), 1)
    return tl.where(repeats > 1, tl.where(top > 0, BETA * top, 0.0), top)
