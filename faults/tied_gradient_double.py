"""A tied matrix whose gradient has one share twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.tied_matrix import USERS, ScaledShare, check_user


@dataclass(frozen=True)
class TiedGradientDouble(OperationFault):
    """The tied matrix counts one share of its gradient ``factor`` times, at the steps of a window.

    What breaks: head and embedding of one matrix lie on different workers, each with a share of the gradient, and the
    order of two reductions lets one share count with another weight than the other. Report: Megatron-LM #844.
    Equation: dW = dW_embedding + factor dW_head for share ``head``, the other way round for ``embedding``, in every
    micro-batch, before the clip. The report's weights differ by partition of the matrix and by worker; here one factor
    holds for the whole matrix. The laws of linear layers do not see it, as a tied head has none for its weight.

    share: ``head`` or ``embedding``; factor: 0 or more, 1 is the healthy control. Raises ValueError on impossible
    values, by name, and for a model whose head has a matrix of its own.
    """

    share: str = "head"
    factor: float = 2.0

    def __post_init__(self) -> None:
        check_user("share", self.share)
        if not 0 <= self.factor < math.inf:
            raise ValueError(f"fault.factor={self.factor} is not allowed: 0 or more, 1 is the healthy control")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("modules", (ScaledShare(USERS[self.share], "dw", self.factor),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "modules", "modules": (USERS[self.share],), "tensor": "share of dw"}
        injection = self.injection("scale", where, {"factor": self.factor}, control=self.factor == 1)
        return InjectionCard(self.family, (injection,))
