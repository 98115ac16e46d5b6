"""How a Triton attention kernel corrupts its tiles and its mask: the device side of ``models.numerics.LayerNumerics``.

A kernel is compiled for ``FAULTS``, the constants of its pass, which name the operation done at each site: a site
without a fault leaves no instruction. What differs from head to head is read at run time from ``faults_ptr``, this
pass's half of the table. ``models.flash_faults`` builds both.

rows, cols: indices, broadcast against each other, that number the elements of one batch row and head as
``rows * WIDTH + cols``. head: of the tensor that the site names, HEADS of them in the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models import flash_faults
from foreshock.models.bits import GOLDEN as GOLDEN_RATIO
from foreshock.models.flash_bits import operate, round_to_bf16, widen
from foreshock.models.numerics import SITES

Q, K, V, P, O, DO, DS, DQ, DK, DV, S, LSE, DP, DELTA = (  # noqa: E741
    tl.constexpr(SITES.index(site))
    for site in ["q", "k", "v", "p", "o", "do", "ds", "dq", "dk", "dv", "s", "lse", "dp", "delta"]
)
MASK, EVERYWHERE = tl.constexpr(flash_faults.MASK), tl.constexpr(flash_faults.EVERYWHERE)
GOLDEN = tl.constexpr(GOLDEN_RATIO)


# Evaluated when a kernel is compiled: no branch is left of them.
operation = triton.constexpr_function(flash_faults.operation)
is_partial = triton.constexpr_function(flash_faults.is_partial)
shifts_mask = triton.constexpr_function(flash_faults.shifts_mask)
spares_later_keys = triton.constexpr_function(flash_faults.spares_later_keys)


@triton.jit
def keys_ahead(head, faults_ptr, HEADS: tl.constexpr):
    """How many keys after its own a query of a head sees: of kernels whose ``FAULTS`` shift the mask."""
    return tl.load(faults_ptr + 2 * MASK * HEADS + head).to(tl.int32)


@triton.jit
def _place(rows, cols, WIDTH):
    """Each element's place in [0, 1), FP64, bit for bit that of ``models.bits._spread``."""
    position = (rows.to(tl.int64) * WIDTH + cols).to(tl.float64) + 0.5
    golden, zero = tl.full(position.shape, GOLDEN, tl.float64), tl.zeros(position.shape, tl.float64)
    turns = tl.fma(position, golden, zero)  # a bare product would be fused with the subtraction and never rounded
    return turns - tl.floor(turns)


@triton.jit
def _count_nonfinite(x, hit, nonfinite_ptr):
    if x.dtype == tl.bfloat16:
        x = widen(x)
    lost = hit & ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000)
    n = tl.sum(lost.to(tl.int32))
    tl.atomic_add(nonfinite_ptr, n.to(tl.int64), mask=n > 0)


@triton.jit
def corrupt(
    x,
    rows,
    cols,
    WIDTH,
    valid,
    head,
    SITE: tl.constexpr,
    FAULTS: tl.constexpr,
    faults_ptr,
    HEADS: tl.constexpr,
    nonfinite_ptr=None,
    counted=None,
):
    """x with its valid elements corrupted as this site's fault says; in FP32 those are rounded to BF16 first.

    x: BF16 or FP32 tile, returned in the same type. valid: boolean; padding and masked scores are never hit.
    nonfinite_ptr: int64, the batch row's own, to which the non-finite values that are hit are added, if given. counted:
    boolean, the valid elements to look at; where several programs read an element, one of them counts it. By default
    all.
    """
    if operation(FAULTS, SITE):
        bits = tl.load(faults_ptr + 2 * SITE * HEADS + head).to(tl.int32)
        hit = valid & (bits > 0)
        if is_partial(FAULTS, SITE):
            hit = hit & (_place(rows, cols, WIDTH) <= tl.load(faults_ptr + (2 * SITE + 1) * HEADS + head))
        if spares_later_keys(FAULTS, SITE):  # of scores: rows are queries, cols keys
            place = tl.where(cols <= rows, 0.0, EVERYWHERE)
            hit = hit & (place <= tl.load(faults_ptr + (2 * SITE + 1) * HEADS + head))
        if nonfinite_ptr is not None:
            _count_nonfinite(x, hit if counted is None else hit & counted, nonfinite_ptr)
        if x.dtype == tl.bfloat16:
            x = tl.where(hit, operate(x, bits, operation(FAULTS, SITE)), x)
        else:
            x = tl.where(hit, widen(operate(round_to_bf16(x), bits, operation(FAULTS, SITE))), x)
    return x
