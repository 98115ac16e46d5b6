"""A clip that is off, has a wrong norm, or takes the norm of too few tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.clip_operation import SCOPES, ClipOperation
from foreshock.faults.corrupt import Corrupt, OperationFault


@dataclass(frozen=True)
class WrongClip(OperationFault):
    """The gradient clip with another norm or another scope, at the steps of a window.

    What breaks: a clip that a configuration drops or mistypes, or one whose norm is that of a shard because the norms
    were not summed over shards. Report of the scope: pytorch #170862.
    Equation: for each part S of the gradients, g_S <- min(1, factor clip / (||g_S|| + 1e-6)) g_S; in health the one
    part is the model and the factor 1. A part smaller than the model has a smaller norm, so that it is clipped less,
    and the gradient's direction changes. The parts here are parameter groups or tensors, not the shards of a rank.

    factor: on the run's clip, above 0, None for no clip; scope: of ``clip_operation.SCOPES``. Factor 1 and
    ``model`` are the healthy control. A run whose norm never reaches the clip is an error at its end, as nothing has
    changed. Raises ValueError on impossible values, by name.
    """

    factor: float | None = None
    scope: str = "model"

    def __post_init__(self) -> None:
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise ValueError(f"fault.factor={self.factor} is not allowed: above 0, finite, or null for no clip")
        if self.scope not in SCOPES:
            raise ValueError(f"fault.scope={self.scope!r} is not allowed: one of {', '.join(SCOPES)}")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("clip", (ClipOperation(self.factor, self.scope),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "clip", "scope": self.scope}, {"factor": self.factor}
        control = self.factor == 1 and self.scope == "model"
        return InjectionCard(self.family, (self.injection("clip", where, size, control=control),))
