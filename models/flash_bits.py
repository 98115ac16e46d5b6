"""The operations of ``models.bits`` on a Triton tile, and its way in and out of BF16.

Each ``@triton.jit`` function here has a PyTorch twin of the same name; both give the same 16 bits for all 65,536
BF16 numbers. ``bits`` is a scalar that the kernel reads at run time: 0 leaves every number as it is.

Triton's interpreter (``TRITON_INTERPRET=1``, a CPU without a compiler) drops the low half of an FP32 number where a
GPU rounds to BF16, and multiplies BF16 matrices as if their bits were integers. ``round_to_bf16``, ``widen`` and
``product`` do there by hand what the hardware does, to the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.models.flash_faults import OPERATION_NUMBERS

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TRUNCATE, ROUND_HALF_UP, FLIP = (
    tl.constexpr(OPERATION_NUMBERS[name]) for name in ("truncate", "round_half_up", "flip")
)


@triton.jit
def truncate(raw, bits):
    """Clear the lowest bits. raw: int32 tile with a BF16 number in its low half; bits: 0 to 8."""
    return raw & (-1 << bits)


@triton.jit
def round_half_up(raw, bits):
    """Add half of the last kept bit, then clear those below it. raw: as in ``truncate``; bits: 0 to 8."""
    return (raw + ((1 << bits) >> 1)) & (-1 << bits)


@triton.jit
def flip(raw, bits):
    """Invert the ``bits``-th bit from below. raw: as in ``truncate``; bits: 0 to 16."""
    return raw ^ ((1 << bits) >> 1)


@triton.jit
def operate(x, bits, OPERATION: tl.constexpr):
    """x, a BF16 tile, after the operation."""
    raw = x.to(tl.int16, bitcast=True).to(tl.int32)
    if OPERATION == TRUNCATE:
        raw = truncate(raw, bits)
    elif OPERATION == ROUND_HALF_UP:
        raw = round_half_up(raw, bits)
    elif OPERATION == FLIP:
        raw = flip(raw, bits)
    return raw.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_bf16(x):
    """An FP32 tile rounded to the nearest BF16 numbers, ties to even; NaN stays NaN."""
    if INTERPRETED:
        raw = x.to(tl.int32, bitcast=True)
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        quiet_nan = (raw >> 16) | 0x0040
        return tl.where(x != x, quiet_nan, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def widen(x):
    """A BF16 tile in FP32, exactly; an FP32 tile as it is."""
    if x.dtype == tl.float32:
        return x
    elif INTERPRETED:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def product(a, b):
    """The matrix product of two BF16 tiles, accumulated in FP32."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), input_precision="ieee")
    else:
        return tl.dot(a, b)
