"""Faults of one operation: where x what x when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.window import Window


@dataclass(frozen=True)
class Corrupt:
    """An operation at one point of the step while a window is open.

    where: a field of ``Sites``; operation: a value of that field's type, which is added to what is there; when: the
    faulty steps.
    """

    where: str
    operation: Any
    when: Window

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.when:
            return healthy
        return replace(healthy, **{self.where: getattr(healthy, self.where) + self.operation})


@dataclass(frozen=True, kw_only=True)
class OperationFault(WindowedFault):
    """A fault that is one ``Corrupt``, which its class builds from its own fields as ``corrupt``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.corrupt  # noqa: B018  (building it checks its fields)

    @property
    def corrupt(self) -> Corrupt:
        raise NotImplementedError

    def sites(self, step: int, healthy: Sites) -> Sites:
        return self.corrupt.sites(step, healthy)
