"""The forward kernel of ``models.flash``: causal attention of one tile of queries, key tile by key tile.

Online softmax in base 2 (Dao, arXiv:2307.08691): with ``top`` the largest score so far, ``total`` the sum of
Pbar = 2^(S - top) and ``acc`` that of Pbar V, both rescaled when ``top`` rises. A fault on ``p`` meets Pbar relative
to the ``top`` of its tile: with one tile of keys a row that is the row's maximum, as in the reference. Of the other
arithmetics (``models.arithmetic``): a running sum in BF16 is rounded, where a block of keys ends, after it has been
rescaled and added to; with ``row_max=dynamic`` ``top`` is the row's from the start; with ``offset`` it includes that.

Shapes: q (B, H, T, D); k, v (B, G, T, D); o like q; lse (B, H, T), natural logarithm; all contiguous.
BLOCK_D: D rounded up to a power of two; the columns between them are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models.flash_bits import product, round_to_bf16, widen
from foreshock.models.flash_scores import base_2, moved_maximum, scores
from foreshock.models.flash_sites import K, O, P, Q, V, corrupt, keys_ahead, operation, shifts_mask
from foreshock.models.flash_tiles import LN_2, LOG2_E, key_range, load_tile, sees, store_tile


@triton.jit
def _attend(
    acc,
    unrounded,
    total,
    top,
    q,
    first_row,
    start,
    stop,
    k_ptr,
    v_ptr,
    T,
    head,
    kv_head,
    counts_keys,
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
    PV_BLOCK: tl.constexpr,
    STORED_FP32: tl.constexpr,
    OFFSET: tl.constexpr,
    BETA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take in the keys from start to stop; MASKED: some of them are outside some row's sight."""
    UNIT: tl.constexpr = base_2(SCALE, FAULTS)
    i, dims = first_row + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    for first in range(start, stop, COLS):
        cols = first + tl.arange(0, COLS)
        keys, inside = cols[:, None], (cols[:, None] < T) & (dims < D)
        j = cols[None, :]
        seen = i < T
        if MASKED:
            seen = sees(i, j, T, WINDOW, ahead)

        k = load_tile(k_ptr, cols, T, D, BLOCK_D, not MASKED)
        v = load_tile(v_ptr, cols, T, D, BLOCK_D, not MASKED)
        if MASKED or shifts_mask(FAULTS):  # each key lies on the right diagonal of one query tile: there it is counted
            own = inside & counts_keys & (keys >= first_row) & (keys < first_row + ROWS)
            k = corrupt(k, keys, dims, D, inside, kv_head, K, FAULTS, faults_ptr, HEADS, nonfinite_ptr, own)
            v = corrupt(v, keys, dims, D, inside, kv_head, V, FAULTS, faults_ptr, HEADS, nonfinite_ptr, own)
        else:
            k = corrupt(k, keys, dims, D, inside, kv_head, K, FAULTS, faults_ptr, HEADS)
            v = corrupt(v, keys, dims, D, inside, kv_head, V, FAULTS, faults_ptr, HEADS)

        s = product(q, tl.trans(k))
        s = scores(s, i, j, T, seen, head, faults_ptr, nonfinite_ptr, SCALE, HEADS, FAULTS, MASKED)
        if BETA > 0:
            new_top = top
        elif OFFSET > 0:
            new_top = tl.maximum(top, tl.max(s, 1) * UNIT + OFFSET * LOG2_E)
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * UNIT)
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
        rescale = tl.exp2(top - reference)
        p_bar = tl.exp2(s * UNIT - reference[:, None])
        total = total * rescale + tl.sum(p_bar, 1)
        p = round_to_bf16(p_bar)
        p = corrupt(p, i, j, T, seen, head, P, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
        added = product(p, v)
        acc = acc * rescale[:, None] + added
        if PV_BLOCK > 0:
            if STORED_FP32:
                unrounded = unrounded * rescale[:, None] + added
            acc = tl.where((first + COLS) % PV_BLOCK == 0, widen(round_to_bf16(acc)), acc)
        top = new_top
    return acc, unrounded, total, top


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    saved_o_ptr,
    lse_ptr,
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
    PV_BLOCK: tl.constexpr,
    STORED_FP32: tl.constexpr,
    OFFSET: tl.constexpr,
    BETA: tl.constexpr,
):
    """O and L of ROWS queries of one head. Grid: (batch x HEADS, tiles of queries), the longest rows first.

    saved_o_ptr: where O is kept for the backward, written only where that is another than the one returned.
    PV_BLOCK, STORED_FP32, OFFSET, BETA: see ``models.flash_arithmetic``.
    """
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

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    unrounded = tl.zeros([ROWS, BLOCK_D], tl.float32)  # followed only where acc is rounded on the way
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    ahead = keys_ahead(head, faults_ptr, HEADS) if shifts_mask(FAULTS) else None
    start, unmasked, diagonal, stop = key_range(first_row, ROWS, COLS, T, WINDOW, ahead)
    counts_keys = head % (HEADS // KV_HEADS) == 0
    if BETA > 0:
        top = moved_maximum(
            q, first_row, start, stop, k_ptr + of_kv_head * D, T, head, kv_head, faults_ptr, ahead,
            BETA, SCALE, WINDOW, D, BLOCK_D, ROWS, COLS, HEADS, FAULTS,
        )  # fmt: skip
    for STAGE in tl.static_range(3):  # the window's edge, whole tiles, the diagonal
        if WINDOW or STAGE > 0:
            acc, unrounded, total, top = _attend(
                acc,
                unrounded,
                total,
                top,
                q,
                first_row,
                start if STAGE == 0 else (unmasked if STAGE == 1 else diagonal),
                unmasked if STAGE == 0 else (diagonal if STAGE == 1 else stop),
                k_ptr + of_kv_head * D,
                v_ptr + of_kv_head * D,
                T,
                head,
                kv_head,
                counts_keys,
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
                PV_BLOCK,
                STORED_FP32,
                OFFSET,
                BETA,
                MASKED=STAGE != 1,
            )

    if PV_BLOCK <= 0:
        unrounded = acc
    if PV_BLOCK:
        acc = widen(round_to_bf16(acc))
    o = round_to_bf16(acc / total[:, None])
    if STORED_FP32:
        store_tile(saved_o_ptr + of_head * D, unrounded / total[:, None], rows, T, D, BLOCK_D)
    elif operation(FAULTS, O):
        store_tile(saved_o_ptr + of_head * D, o, rows, T, D, BLOCK_D)
    o = corrupt(o, i, dims, D, inside, head, O, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    store_tile(o_ptr + of_head * D, o, rows, T, D, BLOCK_D)
    tl.store(lse_ptr + of_head + rows, (top + tl.log2(total)) * LN_2, mask=rows < T)
