"""What a Triton attention kernel is told about a layer's arithmetic: ``models.arithmetic`` in plain numbers.

A kernel is compiled for them, so that the ordinary arithmetic leaves no instruction of the others.
"""

from __future__ import annotations

from typing import NamedTuple

from foreshock.models.arithmetic import Arithmetic

ONCE = -1
"""``pv_block`` of a running sum that is rounded once, before the division by the row sum."""


class KernelArithmetic(NamedTuple):
    """Plain numbers, as ``torch.library`` operators take them; all of them 0 for the ordinary arithmetic.

    pv_block: after how many keys the running sum of Pbar V is rounded to BF16, ``ONCE``, or 0 for never; stored_fp32:
    whether the O for the backward is kept in FP32; delta_of_p: whether delta is rowsum(dP * P); offset: added to the
    maximum of a row, natural logarithm; beta: of a maximum that moves where it repeats, or 0.
    """

    pv_block: float
    stored_fp32: float
    delta_of_p: float
    offset: float
    beta: float


def encode_arithmetic(arithmetic: Arithmetic, key_tile: int) -> list[float]:
    """``KernelArithmetic`` as a list. key_tile: keys that the forward kernel holds at once.

    Raises ValueError for a block that does not end where a tile of keys does.
    """
    block = 0 if arithmetic.pv_accumulation == "fp32" else arithmetic.pv_block or ONCE
    if block > 0 and block % key_tile:
        raise ValueError(
            f"pv_block={block} is not allowed by attention backend 'triton': "
            f"null, or a multiple of the {key_tile} keys of its forward tile (model.tiles)"
        )
    return [
        float(block),
        float(arithmetic.stored_o == "fp32"),
        float(arithmetic.delta == "p"),
        arithmetic.offset or 0.0,
        arithmetic.beta or 0.0,
    ]
