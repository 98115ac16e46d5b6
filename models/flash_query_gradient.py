"""The dQ kernel of ``models.flash``: a tile of queries gathers from the keys that it sees.

Shapes: as in ``models.flash_backward``; dq like q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models.flash_backward import probability, score_gradient
from foreshock.models.flash_bits import product, round_to_bf16
from foreshock.models.flash_sites import DO, DQ, LSE, K, Q, V, corrupt, keys_ahead, shifts_mask
from foreshock.models.flash_tiles import key_range, load_rows, load_tile, sees, store_tile


@triton.jit
def _gather_keys(
    dq,
    q,
    do,
    lse,
    delta,
    first_row,
    start,
    stop,
    k_ptr,
    v_ptr,
    T,
    head,
    kv_head,
    ahead,
    faults_ptr,
    nonfinite_ptr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add to dQ (unscaled) what the keys from start to stop send to a tile of queries."""
    i, dims = first_row + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    for first in range(start, stop, COLS):
        cols = first + tl.arange(0, COLS)
        j, inside = cols[None, :], (cols[:, None] < T) & (dims < D)
        seen = i < T
        if MASKED:
            seen = sees(i, j, T, WINDOW, ahead)

        k = load_tile(k_ptr, cols, T, D, BLOCK_D, not MASKED)
        k = corrupt(k, cols[:, None], dims, D, inside, kv_head, K, FAULTS, faults_ptr, HEADS)
        v = load_tile(v_ptr, cols, T, D, BLOCK_D, not MASKED)
        v = corrupt(v, cols[:, None], dims, D, inside, kv_head, V, FAULTS, faults_ptr, HEADS)
        p = probability(
            product(q, tl.trans(k)), lse[:, None], i, j, T, seen, head, faults_ptr, nonfinite_ptr,
            SCALE, HEADS, FAULTS, MASKED,
        )  # fmt: skip
        ds = score_gradient(
            p, product(do, tl.trans(v)), delta[:, None], i, j, T, seen, head, faults_ptr, nonfinite_ptr,
            HEADS, FAULTS,
        )  # fmt: skip
        dq += product(ds, k)
    return dq


@triton.jit(do_not_specialize=["T"])
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    """dQ of ROWS queries of one head. Grid: (batch x HEADS, tiles of queries), the longest rows first."""
    batch, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    nonfinite_ptr += batch
    kv_head = head // (HEADS // KV_HEADS)
    of_head = tl.program_id(0).to(tl.int64) * T
    of_kv_head = (batch * KV_HEADS + kv_head).to(tl.int64) * T
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    i, dims = rows[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (i < T) & (dims < D)

    q = load_tile(q_ptr + of_head * D, rows, T, D, BLOCK_D)
    q = corrupt(q, i, dims, D, inside, head, Q, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    do = load_tile(do_ptr + of_head * D, rows, T, D, BLOCK_D)
    do = corrupt(do, i, dims, D, inside, head, DO, FAULTS, faults_ptr, HEADS)
    lse = load_rows(lse_ptr + of_head, rows, T)
    lse = corrupt(lse, rows, 0, 1, rows < T, head, LSE, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    delta = load_rows(delta_ptr + of_head, rows, T)

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    ahead = keys_ahead(head, faults_ptr, HEADS) if shifts_mask(FAULTS) else None
    start, unmasked, diagonal, stop = key_range(first_row, ROWS, COLS, T, WINDOW, ahead)
    for STAGE in tl.static_range(3):  # the window's edge, whole tiles, the diagonal
        if WINDOW or STAGE > 0:
            dq = _gather_keys(
                dq,
                q,
                do,
                lse,
                delta,
                first_row,
                start if STAGE == 0 else (unmasked if STAGE == 1 else diagonal),
                unmasked if STAGE == 0 else (diagonal if STAGE == 1 else stop),
                k_ptr + of_kv_head * D,
                v_ptr + of_kv_head * D,
                T,
                head,
                kv_head,
                ahead,
                faults_ptr,
                nonfinite_ptr,
                SCALE,
                WINDOW,
                D,
                BLOCK_D,
                ROWS,
                COLS,
                HEADS,
                FAULTS,
                MASKED=STAGE != 1,
            )

    dq = round_to_bf16(dq * SCALE)
    dq = corrupt(dq, i, dims, D, inside, head, DQ, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    store_tile(dq_ptr + of_head * D, dq, rows, T, D, BLOCK_D)
