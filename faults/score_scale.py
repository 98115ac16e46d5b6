"""Attention scores with the wrong scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.models.numerics import AttentionNumerics
from foreshock.models.wiring import Wiring


@dataclass(frozen=True)
class ScoreScale(OperationFault):
    """1 / sqrt(d_head) is missing from the attention scores, or applied twice, at the steps of a window.

    What breaks: a kernel that scales beside a model that has scaled its queries, or neither of them. No public report
    is named. Equation: S = Q K^T / sqrt(D)^times, in forward and backward, so that scores are sqrt(D) times too large
    for 0 and too small for 2. A scale of another width than D is not modelled. Monitors that compute
    attention again do it with the right scale, so that they see it; those of scores read the right scores, of queries
    and keys as they enter.

    times: 0 to 4; 1 is the healthy control; layers: indices, or None for all. Raises ValueError on impossible
    values, by name.
    """

    times: int
    layers: tuple[int, ...] | None = None

    @cached_property
    def corrupt(self) -> Corrupt:
        wiring = Wiring(scalings=self.times, layers=self.layers)
        return Corrupt("numerics", AttentionNumerics(wirings=(wiring,)), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "numerics", "tensors": ("s",), "phase": "both", "layers": self.layers, "heads": None}
        injection = self.injection("scale_scores", where, {"times": self.times}, control=self.times == 1)
        return InjectionCard(self.family, (injection,))
