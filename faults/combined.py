"""Several faults in one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foreshock.faults.base import Fault, Sites
from foreshock.faults.card import InjectionCard, check_family


@dataclass(frozen=True)
class Combined:
    """Faults by name, each with its own window; each acts on what the one before it left.

    faults: name -> fault, at least one. Its onset is the earliest of theirs, None where none has one.
    Raises ValueError on an empty mapping; at a step where two of them would corrupt one attention value,
    ``sites`` does.
    """

    faults: Mapping[str, Fault]
    family: str = "combined"

    def __post_init__(self) -> None:
        if not self.faults:
            raise ValueError("fault.faults={} is not allowed: name at least one fault")
        check_family(self.family)

    @property
    def onset(self) -> int | None:
        return min((fault.onset for fault in self.faults.values() if fault.onset is not None), default=None)

    def sites(self, step: int, healthy: Sites) -> Sites:
        for fault in self.faults.values():
            healthy = fault.sites(step, healthy)
        return healthy

    def describe(self) -> InjectionCard:
        cards = (fault.describe() for fault in self.faults.values())
        return InjectionCard(self.family, tuple(injection for card in cards for injection in card.injections))
