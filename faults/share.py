"""Faults of a share of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import OperationFault
from foreshock.faults.operation import Moment


def check_share(share: float, name: str = "share") -> None:
    """Raises ValueError for a share outside 0 to 1, or NaN, by name."""
    if not 0 <= share <= 1:
        raise ValueError(f"fault.{name}={share} is not allowed: 0 (the healthy control) to 1")


def chosen_rows(purpose: str, share: float, sequences: int, moment: Moment) -> np.ndarray:
    """Which ceil(share x sequences) of a batch are hit, drawn without replacement from seed, step and purpose."""
    return moment.generator(purpose).permutation(sequences)[: math.ceil(share * sequences)]


@dataclass(frozen=True)
class ShareFault(OperationFault):
    """A fault of one operation on a share of a batch. share: 0 (the healthy control) to 1."""

    share: float

    def __post_init__(self) -> None:
        check_share(self.share)
        super().__post_init__()

    def card(self, what: str, size: dict[str, float | int | str] | None = None) -> InjectionCard:
        """The card of its one injection, in the family of its YAML. size: its parameters beside the share."""
        operation, where = self.corrupt.operation[0], {"point": self.corrupt.where}
        if hasattr(operation, "changes"):
            where |= {"tensors": operation.changes}
        whole = {"share": self.share, **(size or {})}
        return InjectionCard(self.family, (self.injection(what, where, whole, control=self.share == 0),))
