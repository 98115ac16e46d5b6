"""No fault: the healthy run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foreshock.faults.base import Sites
from foreshock.faults.card import InjectionCard


@dataclass(frozen=True)
class NoFault:
    """Every step is healthy; there is no onset."""

    onset: ClassVar[int | None] = None

    def sites(self, step: int, healthy: Sites) -> Sites:
        return healthy

    def describe(self) -> InjectionCard:
        return InjectionCard("healthy")
