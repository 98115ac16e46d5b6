"""The delta of ``models.flash`` that no error of O reaches: rowsum(dP * P), as ``models.arithmetic`` has it.

Shapes: as in ``models.flash_backward``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models.flash_backward import probability
from foreshock.models.flash_bits import product
from foreshock.models.flash_sites import DELTA, DO, DP, LSE, K, Q, V, corrupt, keys_ahead, shifts_mask
from foreshock.models.flash_tiles import key_range, load_rows, load_tile, sees


@triton.jit(do_not_specialize=["T"])
def delta_of_p_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    faults_ptr,
    nonfinite_ptr,
    T,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """delta = rowsum(dP * P) of ROWS queries of one head, in FP32. Grid: (batch x HEADS, tiles of queries).

    It counts the non-finite values of do and delta, as the kernel does in whose place it stands.
    """
    batch, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    nonfinite_ptr += batch
    kv_head = head // (HEADS // KV_HEADS)
    of_head = tl.program_id(0).to(tl.int64) * T
    of_kv_head = (batch * KV_HEADS + kv_head).to(tl.int64) * T
    first_row = tl.program_id(1) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    i, dims = rows[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (i < T) & (dims < D)

    q = load_tile(q_ptr + of_head * D, rows, T, D, BLOCK_D)
    q = corrupt(q, i, dims, D, inside, head, Q, FAULTS, faults_ptr, HEADS)
    do = load_tile(do_ptr + of_head * D, rows, T, D, BLOCK_D)
    do = corrupt(do, i, dims, D, inside, head, DO, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    lse = load_rows(lse_ptr + of_head, rows, T)
    lse = corrupt(lse, rows, 0, 1, rows < T, head, LSE, FAULTS, faults_ptr, HEADS)

    delta = tl.zeros([ROWS], tl.float32)
    ahead = keys_ahead(head, faults_ptr, HEADS) if shifts_mask(FAULTS) else None
    start, _, _, stop = key_range(first_row, ROWS, COLS, T, WINDOW, ahead)
    for first in range(start, stop, COLS):
        cols = first + tl.arange(0, COLS)
        j, key_inside = cols[None, :], (cols[:, None] < T) & (dims < D)
        seen = sees(i, j, T, WINDOW, ahead)
        k = load_tile(k_ptr + of_kv_head * D, cols, T, D, BLOCK_D)
        k = corrupt(k, cols[:, None], dims, D, key_inside, kv_head, K, FAULTS, faults_ptr, HEADS)
        v = load_tile(v_ptr + of_kv_head * D, cols, T, D, BLOCK_D)
        v = corrupt(v, cols[:, None], dims, D, key_inside, kv_head, V, FAULTS, faults_ptr, HEADS)
        p = probability(
            product(q, tl.trans(k)), lse[:, None], i, j, T, seen, head, faults_ptr, None, SCALE, HEADS, FAULTS, True
        )
        dp = product(do, tl.trans(v))
        dp = corrupt(dp, i, j, T, seen, head, DP, FAULTS, faults_ptr, HEADS)
        delta += tl.sum(dp * p, 1)

    delta = corrupt(delta, rows, 0, 1, rows < T, head, DELTA, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    tl.store(delta_ptr + of_head + rows, delta, mask=rows < T)
