"""Operations on the tensors of one parameter group, and faults of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foreshock.faults.corrupt import OperationFault
from foreshock.faults.operation import Operation, Training
from foreshock.models.transformer import PARAMETER_GROUPS, TransformerConfig, parameter_group, skeleton


@dataclass(frozen=True)
class OfGroup(Operation):
    """Reaches every parameter of a group of ``models.transformer.PARAMETER_GROUPS``, or all for None."""

    group: str | None

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if not self.touches(name for name, _ in skeleton(model).named_parameters()):
            raise ValueError(f"fault.group={self.group!r} has no effect: the model has no parameter of that group")

    def overlaps(self, other: OfGroup) -> bool:
        """Whether both reach some parameter of a model."""
        return None in (self.group, other.group) or self.group == other.group

    def touches(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.group is None or parameter_group(name) == self.group]


@dataclass(frozen=True)
class GroupFault(OperationFault):
    """A fault of one operation whose only parameter is a group, None for all. Raises ValueError for another group."""

    group: str | None = None

    def __post_init__(self) -> None:
        check_group(self.group)
        super().__post_init__()


def check_group(group: str | None) -> None:
    """Raise ValueError for a group that no model has."""
    if group is not None and group not in PARAMETER_GROUPS:
        raise ValueError(f"fault.group={group!r} is not allowed: one of {', '.join(PARAMETER_GROUPS)}, or null for all")
