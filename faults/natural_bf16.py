"""Low-precision attention as it is, with nothing injected: the natural fault of arXiv:2510.04212, and its cures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.models.arithmetic import ORDINARY, Arithmetic
from foreshock.models.numerics import AttentionNumerics


@dataclass(frozen=True)
class NaturalBF16(OperationFault):
    """Round Pbar V to BF16 in every layer at the steps of a window, with or without a cure.

    Source and mechanism: ``models.arithmetic``, which has the meaning and the range of every field.
    ``pv_accumulation="fp32"`` with nothing else changed is the healthy control on the same kernel.
    Raises ValueError on impossible values, by name.
    """

    pv_accumulation: str = "bf16"
    pv_block: int | None = None
    stored_o: str = "bf16"
    delta: str = "o"
    row_max: str = "plain"
    beta: float | None = None
    offset: float | None = None

    @cached_property
    def corrupt(self) -> Corrupt:
        cure = self.stored_o, self.delta, self.row_max, self.beta, self.offset
        arithmetic = Arithmetic(self.pv_accumulation, self.pv_block, *cure)
        return Corrupt("numerics", AttentionNumerics(arithmetic=arithmetic), self.window)

    def describe(self) -> InjectionCard:
        arithmetic = self.corrupt.operation.arithmetic
        where = {"point": "numerics", "tensors": (), "phase": "both", "layers": None, "heads": None}
        injection = self.injection("arithmetic", where, asdict(arithmetic), control=arithmetic == ORDINARY)
        return InjectionCard(self.family, (injection,))
