"""dQ of ``models.flash`` where the kernel of the keys has added it up: rounded, and corrupted on ``dq``."""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models.flash_bits import round_to_bf16
from foreshock.models.flash_sites import DQ, corrupt
from foreshock.models.flash_tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["T"])
def query_sum_kernel(
    dq_sum_ptr,
    dq_ptr,
    faults_ptr,
    nonfinite_ptr,
    T,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    FAULTS: tl.constexpr,
):
    """dQ (B, H, T, D), BF16, of ROWS queries of one head; dq_sum: like it in FP32, unscaled.

    Grid: (batch x HEADS, tiles of queries).
    """
    head = tl.program_id(0) % HEADS
    nonfinite_ptr += tl.program_id(0) // HEADS
    of_head = tl.program_id(0).to(tl.int64) * T
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i, dims = rows[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (i < T) & (dims < D)

    dq = round_to_bf16(load_tile(dq_sum_ptr + of_head * D, rows, T, D, BLOCK_D) * SCALE)
    dq = corrupt(dq, i, dims, D, inside, head, DQ, FAULTS, faults_ptr, HEADS, nonfinite_ptr)
    store_tile(dq_ptr + of_head * D, dq, rows, T, D, BLOCK_D)
