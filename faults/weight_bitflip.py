"""A bit of a weight flipped once: silent data corruption in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foreshock.faults.flipped_bits import BitflipFault


@dataclass(frozen=True)
class WeightBitflip(BitflipFault):
    """One bit of one weight, or of a row of neighbouring weights, inverted at the steps of a window: by default once.

    What breaks: memory or a core that corrupts data without an error. Reports: Dixit et al., arXiv:2102.11245;
    LMResiliency/lm-resiliency, which injects it into training.
    Equation: raw <- raw XOR 2^(bit - 1) on the 32-bit integer of each FP32 weight hit, after the update, so that the
    next forward is the first to read it. Which weights is drawn uniformly, a pure function of seed and step. The
    optimizer's state stays right, and it trains on from the wrong weight. It does not model a bit that sticks (every
    later update writes over it) or replicas that disagree.

    parameter, bit, count: as ``faults.flipped_bits.BitflipFault`` has them; bit 0 is the healthy control.
    """

    point: ClassVar[str] = "weights"
    what: ClassVar[str] = "weight"
