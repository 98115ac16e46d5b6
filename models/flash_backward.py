"""The backward of ``models.flash``: delta, and what the kernels of the keys and of the queries both recompute.

P is 2^(S - L) in base 2, so no row sum is needed and every gradient is one sum in registers, in a fixed order and
without atomics: the same bits at every run. Where ``Tiles.deterministic`` is not asked for, dQ is an exception.

Each site is corrupted wherever it is read, and its non-finite values are counted by the one kernel that reads every
element once: o, do, delta by this module's; k, v, dk, dv by that of the keys; the others by that of the queries. Where
there is none, dq by the one that rounds it, and the others by that of the keys.
Shapes: as in ``models.flash_forward``; delta (B, H, T) in FP32; do like q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models.flash_bits import round_to_bf16, widen
from foreshock.models.flash_scores import base_2, scores
from foreshock.models.flash_sites import DELTA, DO, DP, DS, O, P, corrupt
from foreshock.models.flash_tiles import LOG2_E, load_tile


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
    nonfinite_ptr += tl.program_id(0) // HEADS
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
def probability(
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
    s = scores(qk, i, j, T, seen, head, faults_ptr, nonfinite_ptr, SCALE, HEADS, FAULTS, MASKED)
    p = tl.exp2(s * base_2(SCALE, FAULTS) - lse * LOG2_E)
    return corrupt(p, i, j, T, seen, head, P, FAULTS, faults_ptr, HEADS, nonfinite_ptr)


@triton.jit
def score_gradient(
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
