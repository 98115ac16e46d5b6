"""Injection cards: what a fault does, as plain data for the manifest and the audit receipt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreshock.faults.window import Window

BENIGN = "benign"
"""The family of planned changes that break nothing, controls for monitors."""

FAMILIES = (
    "attention_numerics",
    "module_numerics",
    "gradients",
    "optimizer",
    "schedule",
    "weights",
    "data",
    "experts",
    "recompute",
    "resume",
    "system",
    "ranks",
    BENIGN,
    "combined",
    "other",
)
"""What a fault breaks, for tables."""


def check_family(family: str) -> None:
    """Raises ValueError for a family that is not one of ``FAMILIES``."""
    if family not in FAMILIES:
        raise ValueError(f"fault.family={family!r} is not allowed: one of {', '.join(FAMILIES)}")


@dataclass(frozen=True)
class Injection:
    """One change that a fault makes.

    what: the operation by name, such as ``truncate``; where: the point of the step (``point``, a field of ``Sites``)
    and what the operation reaches there; size: its parameters by name; window: when; control: whether it changes
    nothing by its own parameters, as 0 bits or a factor of 1 do.
    """

    what: str
    where: Mapping[str, Any]
    size: Mapping[str, Any]
    window: Window
    control: bool = False


@dataclass(frozen=True)
class InjectionCard:
    """All that a fault does: its family and its injections, none for a healthy run.

    ``dataclasses.asdict`` makes it plain numbers, texts, lists and mappings.
    """

    family: str
    injections: tuple[Injection, ...] = ()

    @property
    def first_step(self) -> int | None:
        """The first update that is faulty, from 0; of controls alone, the first that one touches; None in health."""
        acting = [injection for injection in self.injections if not injection.control] or self.injections
        return min((injection.window.first for injection in acting), default=None)

    @property
    def control(self) -> bool:
        """Whether no injection changes anything."""
        return all(injection.control for injection in self.injections)


def read_card(plain: Mapping[str, Any]) -> InjectionCard:
    """The card of plain values, as a manifest has it. Raises TypeError, ValueError or KeyError where they are none."""
    injections = (Injection(**{**entry, "window": Window(**entry["window"])}) for entry in plain["injections"])
    return InjectionCard(plain["family"], tuple(injections))
