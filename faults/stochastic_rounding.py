"""Weights or gradients rounded at random to a neighbour in a lower format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import OfGroup, check_group
from foreshock.faults.operation import Moment
from foreshock.faults.rounding import STOCHASTIC, check_format, stochastic

TENSORS = ("weights", "gradients")


@dataclass(frozen=True)
class StochasticallyRounded(OfGroup):
    """The tensors of a group, each rounded with draws of its own. form: of ``faults.rounding.STOCHASTIC``."""

    form: str

    @property
    def idle(self) -> bool:
        return self.form == "fp32"

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        return stochastic(x, self.form, moment)


@dataclass(frozen=True)
class StochasticRounding(OperationFault):
    """Weights or gradients rounded stochastically to BF16 or lower, at the steps of a window.

    What it does: the cure for updates that vanish in a narrow format, and the noise that it brings. Source:
    arXiv:2010.06192. No public report of a failure is known.
    Equation: t <- t's lower or upper neighbour in the format, with the probabilities that make the mean t: after the
    update for weights, before the norm and the clip for gradients. The draw is a function of seed, step and tensor.
    FP8 has no scale: E4M3 saturates at 448 and E5M2 at 57344, and below 2^-9 and 2^-16 a number is 0 or that. Moments
    stay FP32. Not modelled: hardware's draws, of few random bits.

    tensors: of ``TENSORS``; format: of ``faults.rounding.STOCHASTIC``, ``fp32`` the healthy control; group: of
    ``PARAMETER_GROUPS``, or None for all. Raises ValueError on impossible values, by name.
    """

    tensors: str
    format: str
    group: str | None = None

    def __post_init__(self) -> None:
        if self.tensors not in TENSORS:
            raise ValueError(f"fault.tensors={self.tensors!r} is not allowed: one of {', '.join(TENSORS)}")
        check_format(self.format, STOCHASTIC)
        check_group(self.group)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt(self.tensors, (StochasticallyRounded(self.group, self.format),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": self.tensors, "group": self.group}, {"format": self.format, "rounding": "stochastic"}
        return InjectionCard(self.family, (self.injection("round", where, size, control=self.format == "fp32"),))
