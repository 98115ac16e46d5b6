"""Adam's moments stored in a narrow format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.adam_state import MOMENTS, RoundedMoments, check_moment
from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import check_group
from foreshock.faults.rounding import check_format


@dataclass(frozen=True)
class AdamStateFormat(OperationFault):
    """Adam's moments are stored in BF16, or narrower, at the steps of a window.

    What breaks: an optimizer that saves memory without error feedback or a scale. No public report is known.
    Equation: after the update m <- round(m) and v <- round(v), to nearest, so that the next one reads rounded moments.
    With beta2 near 1 a change of v below half a unit in the last place is lost. No block has a scale of its own: in FP8
    a small v underflows to 0, which 8-bit optimizers with scales avoid.

    format: of ``faults.rounding.FORMATS``, ``fp32`` the healthy control; moment: of ``adam_state.MOMENTS``, or
    None for both; group: of ``PARAMETER_GROUPS``, or None for all. Raises ValueError on impossible values, by name.
    """

    format: str = "bf16"
    moment: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        check_format(self.format)
        check_moment(self.moment)
        check_group(self.group)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (RoundedMoments(self.group, self.format, self.moment),), self.window)

    def describe(self) -> InjectionCard:
        tensors = MOMENTS if self.moment is None else (self.moment,)
        where = {"point": "optimizer", "group": self.group, "tensors": tensors}
        size = {"format": self.format}
        return InjectionCard(self.family, (self.injection("round", where, size, control=self.format == "fp32"),))
