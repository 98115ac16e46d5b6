"""The laws by which a broken kernel is found. Which sites break which laws: ``analysis.locate.laws``."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.monitors.choices import check_choice

IN_ATTENTION, LINEAR, NORM, ROUTER, LOSS = "attention", "linear layer", "norm", "router", "loss kernel"
KINDS = (IN_ATTENTION, LINEAR, NORM, ROUTER, LOSS)

KEY_SHIFT, VALUE_SHIFT, QK_GAUGE, VO_GAUGE = "key shift", "value shift", "QK gauge", "VO gauge"
DQ, DK, DV = (f"{part} computed again" for part in ("dQ", "dK", "dV"))


@dataclass(frozen=True, order=True)
class Law:
    """One law.

    kind: ``attention``, whose laws tell a site's class together, or the class of kernel that the law names by itself;
    part: its name there: a law of attention, a linear layer, a norm, or the class again where it has no parts.
    Raises ValueError for another kind.
    """

    kind: str
    part: str

    def __post_init__(self) -> None:
        check_choice("law.kind", self.kind, KINDS)

    def __str__(self) -> str:
        return self.part if self.kind in (IN_ATTENTION, self.part) else f"{self.kind} {self.part}"
