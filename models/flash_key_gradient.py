"""The dK and dV kernel of ``models.flash``: a tile of keys gathers from the queries that see it.

dK and dV sum over a group's query heads in FP32 before they are rounded. Tiles of scores are held transposed,
(keys, queries), as both products need them. Shapes: as in ``models.flash_backward``; dk, dv like k.

With ADDS_DQ it also adds what the keys send to dQ, in FP32 atomics: five products where two kernels need seven, in an
order of sums that differs from run to run. ``query_sum_kernel`` then rounds what has come together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models.flash_backward import probability, score_gradient
from foreshock.models.flash_bits import product, round_to_bf16
from foreshock.models.flash_sites import DK, DO, DV, LSE, K, Q, V, corrupt, keys_ahead, shifts_mask
from foreshock.models.flash_tiles import load_rows, load_tile, query_range, sees, store_tile


@triton.jit
def _gather_queries(
    dk,
    dv,
    k,
    v,
    first_col,
    start,
    stop,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_sum_ptr,
    T,
    head,
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
    ADDS_DQ: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add to dK (unscaled) and dV what one head's queries from start to stop send to a tile of keys."""
    of_all = nonfinite_ptr if ADDS_DQ else None  # otherwise the kernel of the queries counts
    of_diagonal = nonfinite_ptr if ADDS_DQ and (MASKED or shifts_mask(FAULTS)) else None
    j, dims = first_col + tl.arange(0, COLS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        i, inside = rows[None, :], (rows[:, None] < T) & (dims < D)
        seen = (i < T) & (j < T)
        if MASKED:
            seen = sees(i, j, T, WINDOW, ahead)

        q = load_tile(q_ptr, rows, T, D, BLOCK_D, not MASKED)
        lse = load_rows(lse_ptr, rows, T, not MASKED)
        own = (rows >= first_col) & (rows < first_col + COLS) & (rows < T)  # each query is on one tile's right diagonal
        q = corrupt(
            q, rows[:, None], dims, D, inside, head, Q, FAULTS, faults_ptr, HEADS, of_diagonal, inside & own[:, None]
        )
        lse = corrupt(lse, rows, 0, 1, rows < T, head, LSE, FAULTS, faults_ptr, HEADS, of_diagonal, own)
        p = probability(
            product(k, tl.trans(q)), lse[None, :], i, j, T, seen, head, faults_ptr, of_all,
            SCALE, HEADS, FAULTS, MASKED,
        )  # fmt: skip

        do = load_tile(do_ptr, rows, T, D, BLOCK_D, not MASKED)
        do = corrupt(do, rows[:, None], dims, D, inside, head, DO, FAULTS, faults_ptr, HEADS)
        dv += product(round_to_bf16(p), do)
        delta = load_rows(delta_ptr, rows, T, not MASKED)
        ds = score_gradient(
            p, product(v, tl.trans(do)), delta[None, :], i, j, T, seen, head, faults_ptr, of_all,
            HEADS, FAULTS,
        )  # fmt: skip
        dk += product(ds, q)
        if ADDS_DQ:
            dq = product(tl.trans(ds), k)
            tl.atomic_add(dq_sum_ptr + rows[:, None] * D + dims, dq, inside, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dq_sum_ptr,
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
    ADDS_DQ: tl.constexpr,
):
    """dK and dV of COLS keys of one KV head. Grid: (batch x KV_HEADS, tiles of keys), the longest columns first."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    batch, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    nonfinite_ptr += batch
    of_kv_head = tl.program_id(0).to(tl.int64) * T
    first_col = tl.program_id(1) * COLS
    cols = first_col + tl.arange(0, COLS)
    j, dims = cols[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (j < T) & (dims < D)

    k = load_tile(k_ptr + of_kv_head * D, cols, T, D, BLOCK_D)
    k = corrupt(k, j, dims, D, inside, kv_head, K, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    v = load_tile(v_ptr + of_kv_head * D, cols, T, D, BLOCK_D)
    v = corrupt(v, j, dims, D, inside, kv_head, V, FAULTS, faults_ptr, HEADS, nonfinite_ptr)

    # Query tiles: first those on the diagonal, then whole ones, then those past the window's edge or the end.
    if not shifts_mask(FAULTS):
        start, whole, whole_stop, stop = query_range(first_col, ROWS, COLS, T, WINDOW)

    dk = tl.zeros([COLS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLS, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        of_head = (batch * HEADS + head).to(tl.int64) * T
        ahead = keys_ahead(head, faults_ptr, HEADS) if shifts_mask(FAULTS) else None
        if shifts_mask(FAULTS):  # each head has a range of its own
            start, whole, whole_stop, stop = query_range(first_col, ROWS, COLS, T, WINDOW, ahead)
        for STAGE in tl.static_range(3):
            dk, dv = _gather_queries(
                dk,
                dv,
                k,
                v,
                first_col,
                start if STAGE == 0 else (whole if STAGE == 1 else whole_stop),
                whole if STAGE == 0 else (whole_stop if STAGE == 1 else stop),
                q_ptr + of_head * D,
                do_ptr + of_head * D,
                lse_ptr + of_head,
                delta_ptr + of_head,
                dq_sum_ptr + of_head * D,
                T,
                head,
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
                ADDS_DQ,
                MASKED=STAGE != 1,
            )

    dk = round_to_bf16(dk * SCALE)
    dk = corrupt(dk, j, dims, D, inside, kv_head, DK, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    store_tile(dk_ptr + of_kv_head * D, dk, cols, T, D, BLOCK_D)
    dv = round_to_bf16(dv)
    dv = corrupt(dv, j, dims, D, inside, kv_head, DV, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    store_tile(dv_ptr + of_kv_head * D, dv, cols, T, D, BLOCK_D)
