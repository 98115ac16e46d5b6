"""One inverted bit of neighbouring FP32 numbers of a tensor, and the faults that are one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import Moment, Operation, Training
from foreshock.models.transformer import TransformerConfig, skeleton

SIGN_BIT = 32


@dataclass(frozen=True)
class FlippedBits(Operation):
    """Flip one bit of ``count`` neighbouring FP32 numbers of a parameter's tensor, at a place drawn from seed and step.

    what: names the kind of tensor, such as ``weight``, so that no two kinds share their draws.
    """

    parameter: str
    bit: int
    count: int
    what: str

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
                f"fault.count={self.count} is not allowed: {self.parameter} has {sizes[self.parameter]} elements"
            )

    def meets(self, other: Any) -> bool:
        same = isinstance(other, FlippedBits) and (self.what, self.parameter) == (other.what, other.parameter)
        return same and self.bit == other.bit and not self.idle  # they draw one place, and undo each other

    def touches(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name == self.parameter]

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        first = int(moment.generator(f"{self.what}_bitflip").integers(x.numel() - self.count + 1))
        mask = -(2**31) if self.bit == SIGN_BIT else 1 << (self.bit - 1)  # the sign bit of an int32 is -2^31
        flipped = x.clone(memory_format=torch.contiguous_format)
        flipped.view(torch.int32).view(-1)[first : first + self.count] ^= mask
        return flipped


def check_flip(bit: int, count: int) -> None:
    """Raise ValueError for a bit that FP32 does not have, or for no element."""
    if not 0 <= bit <= SIGN_BIT:
        raise ValueError(f"fault.bit={bit} is not allowed: 1 to {SIGN_BIT}, or 0 for the healthy control")
    if count < 1:
        raise ValueError(f"fault.count={count} is not allowed: at least 1 element")


@dataclass(frozen=True)
class BitflipFault(OperationFault):
    """A fault that flips a bit of a parameter's weight or gradient.

    point: a field of ``Sites`` of tensor operations; what: as ``FlippedBits`` has it. parameter: a name of
    ``named_parameters()``, such as ``blocks.0.attention.q.weight`` (a tied head's is ``tokens.weight``); bit: from
    below, 1 to 23 of the significand, 24 to 31 of the exponent, 32 the sign, or 0 for the healthy control; count: how
    many neighbours in row-major order. A flipped exponent may give Inf or NaN, with which the run ends as non-finite
    data. Raises ValueError on impossible values, by name.
    """

    point: ClassVar[str]
    what: ClassVar[str]

    parameter: str
    bit: int
    count: int = 1

    def __post_init__(self) -> None:
        check_flip(self.bit, self.count)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt(self.point, (FlippedBits(self.parameter, self.bit, self.count, self.what),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": self.point, "parameter": self.parameter}, {"bit": self.bit, "count": self.count}
        return InjectionCard(self.family, (self.injection("flip", where, size, control=self.bit == 0),))
