"""Low-precision attention as it is, with nothing injected: the natural fault of arXiv:2510.04212, and its cures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from faults.base import Sites, Window
from models.arithmetic import Arithmetic
from models.numerics import AttentionNumerics


@dataclass(frozen=True)
class NaturalBF16:
    """Round Pbar V to BF16 in every layer at the steps of a window, with or without a cure.

    Source and mechanism: ``models.arithmetic``, which has the meaning and the range of every field but the last two.
    ``pv_accumulation="fp32"`` with nothing else changed is the healthy control on the same kernel.
    onset: first faulty update; duration: updates, or None for no end. Raises ValueError on impossible values, by name.
    """

    pv_accumulation: str = "bf16"
    pv_block: int | None = None
    stored_o: str = "bf16"
    delta: str = "o"
    row_max: str = "plain"
    beta: float | None = None
    offset: float | None = None
    onset: int = 0
    duration: int | None = None

    def __post_init__(self) -> None:
        self.numerics, self.window  # noqa: B018  (building them checks every field)

    @cached_property
    def window(self) -> Window:
        return Window(self.onset, self.duration)

    @cached_property
    def numerics(self) -> AttentionNumerics:
        cure = self.stored_o, self.delta, self.row_max, self.beta, self.offset
        return AttentionNumerics(arithmetic=Arithmetic(self.pv_accumulation, self.pv_block, *cure))

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        return replace(healthy, numerics=healthy.numerics | self.numerics)
