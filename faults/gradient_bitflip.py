"""A bit of a gradient flipped: silent data corruption on the way to the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foreshock.faults.flipped_bits import BitflipFault


@dataclass(frozen=True)
class GradientBitflip(BitflipFault):
    """One bit of one element of a gradient, or of neighbouring ones, inverted at the steps of a window.

    What breaks: a core, memory or link that corrupts a gradient without an error. Report: arXiv:2604.00726.
    Equation: raw <- raw XOR 2^(bit - 1) on the 32-bit integer of each FP32 element hit, after accumulation and before
    the norm and the clip, so that a large flip makes the clip shrink every other gradient. Which elements is drawn
    uniformly, a pure function of seed and step. It does not model a flip in one replica before the reduction.

    parameter, bit, count: as ``faults.flipped_bits.BitflipFault`` has them; bit 0 is the healthy control.
    """

    point: ClassVar[str] = "gradients"
    what: ClassVar[str] = "gradient"
