"""A bit of a weight flipped once: silent data corruption in memory."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import Moment, Operation, Training
from foreshock.models.transformer import TransformerConfig, skeleton

SIGN_BIT = 32


@dataclass(frozen=True)
class FlippedWeights(Operation):
    """Flip one bit of ``count`` neighbouring FP32 weights of a parameter, at a place drawn from seed and step."""

    parameter: str
    bit: int
    count: int

    @property
    def idle(self) -> bool:
        return self.bit == 0

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        sizes = {name: weight.numel() for name, weight in skeleton(model).named_parameters()}
        if self.parameter not in sizes:
            near = difflib.get_close_matches(self.parameter, sizes, n=4, cutoff=0.0)
            raise ValueError(
                f"fault.parameter={self.parameter!r} is not allowed: the model has no such parameter; "
                f"the nearest are {', '.join(near)}"
            )
        if self.count > sizes[self.parameter]:
            raise ValueError(
                f"fault.count={self.count} is not allowed: {self.parameter} has {sizes[self.parameter]} weights"
            )

    def touches(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name == self.parameter]

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        first = int(moment.generator("weight_bitflip").integers(x.numel() - self.count + 1))
        mask = -(2**31) if self.bit == SIGN_BIT else 1 << (self.bit - 1)  # the sign bit of an int32 is -2^31
        flipped = x.clone(memory_format=torch.contiguous_format)
        flipped.view(torch.int32).view(-1)[first : first + self.count] ^= mask
        return flipped


@dataclass(frozen=True)
class WeightBitflip(OperationFault):
    """One bit of one weight, or of a row of neighbouring weights, inverted at the steps of a window: by default once.

    What breaks: memory or a core that corrupts data without an error. Reports: Dixit et al., arXiv:2102.11245;
    LMResiliency/lm-resiliency, which injects it into training.
    Equation: raw <- raw XOR 2^(bit - 1) on the 32-bit integer of each FP32 weight hit, after the update, so that the
    next forward is the first to read it. Which weights is drawn uniformly, a pure function of seed and step. The
    optimizer's state stays right, and it trains on from the wrong weight. It does not model a bit that sticks (every
    later update writes over it) or replicas that disagree.

    parameter: a name of ``named_parameters()``, such as ``blocks.0.attention.q.weight`` (a tied head's is
    ``tokens.weight``); bit: from below, 1 to 23 of the significand, 24 to 31 of the exponent, 32 the sign, or 0 for the
    healthy control; count: how many neighbours in row-major order. A flipped exponent may give Inf or NaN, with which
    the run ends as non-finite data. Raises ValueError on impossible values, by name.
    """

    parameter: str
    bit: int
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.bit <= SIGN_BIT:
            raise ValueError(f"fault.bit={self.bit} is not allowed: 1 to {SIGN_BIT}, or 0 for the healthy control")
        if self.count < 1:
            raise ValueError(f"fault.count={self.count} is not allowed: at least 1 weight")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("weights", (FlippedWeights(self.parameter, self.bit, self.count),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "weights", "parameter": self.parameter}, {"bit": self.bit, "count": self.count}
        return InjectionCard(self.family, (self.injection("flip", where, size, control=self.bit == 0),))
