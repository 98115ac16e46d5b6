"""The backward kernels of ``models.flash``: delta, then dK and dV by tiles of keys, then dQ by tiles of queries.

P is recomputed as 2^(S - L) (in base 2), so no row sum is needed and every gradient is one sum in registers, in a
fixed order and without atomics: the same bits at every run. dK and dV sum over a group's query heads before they
are rounded. The key kernel holds its tiles transposed, (keys, queries), as its products need them.

Each site is corrupted wherever it is read, and its non-finite values are counted by the one kernel that reads every
element once: o, do, delta by the first; k, v, dk, dv by the second; the others by the third.
Shapes: as in ``models.flash_forward``; delta (B, H, T) in FP32; do, dq like q; dk, dv like k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.flash_bits import product, round_to_bf16, widen
from models.flash_forward import LOG2_E, key_range, load_tile, sees, store_tile
from models.flash_sites import (
    DELTA,
    DK,
    DO,
    DP,
    DQ,
    DS,
    DV,
    LSE,
    K,
    O,
    P,
    Q,
    S,
    V,
    corrupt,
    operation,
)


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    o_ptr,
    do_ptr,
    delta_ptr,
    faults_ptr,
    nonfinite_ptr,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """delta = rowsum(dO * O) of ROWS queries of one head. Grid: (batch x HEADS, tiles of queries)."""
    head = tl.program_id(0) % HEADS
    of_head = tl.program_id(0).to(tl.int64) * T
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i, dims = rows[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (i < T) & (dims < D)

    o = load_tile(o_ptr + of_head * D, rows, T, D, BLOCK_D)
    o = corrupt(o, i, dims, D, inside, head, O, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    do = load_tile(do_ptr + of_head * D, rows, T, D, BLOCK_D)
    do = corrupt(do, i, dims, D, inside, head, DO, FAULTS, faults_ptr, HEADS, nonfinite_ptr)

    delta = tl.sum(widen(o) * widen(do), 1)
    delta = corrupt(delta, rows, 0, 1, rows < T, head, DELTA, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    tl.store(delta_ptr + of_head + rows, delta, mask=rows < T)


@triton.jit
def _probability(
    qk,
    lse,
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
    """P of a tile in FP32, corrupted on ``s`` and ``p``: what a fault on ``p`` hits is a BF16 number in both its uses.

    qk: Q K^T; lse: corrupted, broadcast against it.
    """
    if operation(FAULTS, S):
        s = qk * SCALE
        s = corrupt(s, i, j, T, seen, head, S, FAULTS, faults_ptr, HEADS, nonfinite_ptr) * LOG2_E
    else:
        s = qk * (SCALE * LOG2_E)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s - lse * LOG2_E)
    return corrupt(p, i, j, T, seen, head, P, FAULTS, faults_ptr, HEADS, nonfinite_ptr)


@triton.jit
def _score_gradient(
    p,
    dp,
    delta,
    i,
    j,
    T,
    seen,
    head,
    faults_ptr,
    nonfinite_ptr,
    HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """dS = P * (dP - delta) of a tile in BF16, corrupted on ``dp`` and ``ds``."""
    dp = corrupt(dp, i, j, T, seen, head, DP, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    ds = round_to_bf16(p * (dp - delta))
    return corrupt(ds, i, j, T, seen, head, DS, FAULTS, faults_ptr, HEADS, nonfinite_ptr)


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
    T,
    head,
    faults_ptr,
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
    """Add to dK (unscaled) and dV what one head's queries from start to stop send to a tile of keys."""
    j, dims = first_col + tl.arange(0, COLS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        i, inside = rows[None, :], (rows[:, None] < T) & (dims < D)
        seen = (i < T) & (j < T)
        if MASKED:
            seen = sees(i, j, T, WINDOW)

        q = load_tile(q_ptr, rows, T, D, BLOCK_D)
        q = corrupt(q, rows[:, None], dims, D, inside, head, Q, FAULTS, faults_ptr, HEADS)
        lse = tl.load(lse_ptr + rows, mask=rows < T, other=0.0)
        lse = corrupt(lse, rows, 0, 1, rows < T, head, LSE, FAULTS, faults_ptr, HEADS)
        p = _probability(
            product(k, tl.trans(q)), lse[None, :], i, j, T, seen, head, faults_ptr, None,
            SCALE, HEADS, FAULTS, MASKED,
        )  # fmt: skip

        do = load_tile(do_ptr, rows, T, D, BLOCK_D)
        do = corrupt(do, rows[:, None], dims, D, inside, head, DO, FAULTS, faults_ptr, HEADS)
        dv += product(round_to_bf16(p), do)
        delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
        ds = _score_gradient(
            p, product(v, tl.trans(do)), delta[None, :], i, j, T, seen, head, faults_ptr, None,
            HEADS, FAULTS,
        )  # fmt: skip
        dk += product(ds, q)
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
    """dK and dV of COLS keys of one KV head. Grid: (batch x KV_HEADS, tiles of keys), the longest columns first."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    batch, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
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
    start = first_col // ROWS * ROWS
    stop = T
    whole_stop = T // ROWS * ROWS
    if WINDOW:
        stop = tl.minimum(stop, first_col + COLS - 1 + WINDOW)
        whole_stop = tl.minimum(whole_stop, (first_col + WINDOW) // ROWS * ROWS)
    whole = tl.minimum(tl.cdiv(first_col + COLS - 1, ROWS) * ROWS, stop)
    whole_stop = tl.maximum(whole_stop, whole)

    dk = tl.zeros([COLS, BLOCK_D], tl.float32)
    dv = tl.zeros([COLS, BLOCK_D], tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        of_head = (batch * HEADS + head).to(tl.int64) * T
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
                T,
                head,
                faults_ptr,
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

    dk = round_to_bf16(dk * SCALE)
    dk = corrupt(dk, j, dims, D, inside, kv_head, DK, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    store_tile(dk_ptr + of_kv_head * D, dk, cols, T, D, BLOCK_D)
    dv = round_to_bf16(dv)
    dv = corrupt(dv, j, dims, D, inside, kv_head, DV, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    store_tile(dv_ptr + of_kv_head * D, dv, cols, T, D, BLOCK_D)


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
            seen = sees(i, j, T, WINDOW)

        k = load_tile(k_ptr, cols, T, D, BLOCK_D)
        k = corrupt(k, cols[:, None], dims, D, inside, kv_head, K, FAULTS, faults_ptr, HEADS)
        v = load_tile(v_ptr, cols, T, D, BLOCK_D)
        v = corrupt(v, cols[:, None], dims, D, inside, kv_head, V, FAULTS, faults_ptr, HEADS)
        p = _probability(
            product(q, tl.trans(k)), lse[:, None], i, j, T, seen, head, faults_ptr, nonfinite_ptr,
            SCALE, HEADS, FAULTS, MASKED,
        )  # fmt: skip
        ds = _score_gradient(
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
    lse = tl.load(lse_ptr + of_head + rows, mask=rows < T, other=0.0)
    lse = corrupt(lse, rows, 0, 1, rows < T, head, LSE, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    delta = tl.load(delta_ptr + of_head + rows, mask=rows < T, other=0.0)

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    start, unmasked, diagonal, stop = key_range(first_row, ROWS, COLS, T, WINDOW)
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
