"""What a signal is: all that judging its values takes, said by its monitor and kept in the run's manifest. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from foreshock.monitors.cadence import Cadence
from foreshock.monitors.choices import check_choice
from foreshock.monitors.law import Law

DIRECTIONS = ("up", "down", "both")
AXES = ((), ("layer",), ("layer", "head"))
LEVEL, RATIO, EXACT, CLOCK = "level", "ratio_to_predicted_noise", "exact", "clock"
KINDS = (LEVEL, RATIO, EXACT, CLOCK)
UNKNOWN_FAMILY = "unknown"
OVER_NOISE = "over_noise"
"""Ends the name of a ratio to predicted noise."""


@dataclass(frozen=True)
class Signal:
    """One named time series of a monitor.

    name: the id of its row in ``monitors/catalogue.csv``, then what distinguishes it there:
        ``qk_delta2_spectrum.entropy.w50``.
    unit: of its values; ``1`` for a pure number.
    bad: the direction of harm: ``up``, ``down`` or ``both``.
    axes: of every reading: ``()``, ``("layer",)`` or ``("layer", "head")``.
    every_steps: the cadence, in optimizer steps.
    jittered: whether it is read at jittered steps (``monitors.cadence``) and not at multiples of the cadence. A monitor
        leaves it out: its needs say it (``monitors.base.described_signals``). A manifest that does not say it is of
        readings at multiples.
    family: the mechanism that it belongs to, as in the catalogue; ``unknown`` for a monitor that is not in there.
    kind: how its values are judged. ``level``: against healthy runs, or against the run's own past.
        ``ratio_to_predicted_noise``: about 1 where nothing but rounding breaks a law. ``exact``: 0 in every healthy
        run, and every other reading is an alarm. ``clock``: a time, which no second run repeats bit for bit.
    law: the law that a ratio is of, where breaking it tells the place of a fault.
    universal: whether the prediction of a ratio is a threshold by itself, without any healthy run: the kernel's own
        arithmetic is computed again. Other predictions are a scale: they take tokens as independent, or one library's
        order of sums as given.
    above, below: the published limits in the signal's unit; None where the source gives no number.
    reference: the catalogue's row, with definition and source; by default the first part of the name.

    Raises ValueError that names the field, its value and what is allowed.
    """

    name: str
    unit: str
    bad: str
    axes: tuple[str, ...] = ()
    every_steps: int = 1
    _: KW_ONLY
    jittered: bool = False
    family: str = UNKNOWN_FAMILY
    kind: str = LEVEL
    law: Law | None = None
    universal: bool = False
    above: float | None = None
    below: float | None = None
    reference: str = ""

    def __post_init__(self) -> None:
        where = f"signal {self.name}: "
        check_choice(f"{where}bad", self.bad, DIRECTIONS)
        check_choice(f"{where}axes", self.axes, AXES)
        check_choice(f"{where}kind", self.kind, KINDS)
        if self.every_steps < 1:
            raise ValueError(f"monitor.every_steps={self.every_steps} is not allowed: at least 1")
        if self.kind != RATIO and (self.law is not None or self.universal):
            field = "universal=True" if self.universal else f"law={str(self.law)!r}"
            raise ValueError(f"{where}{field} is not allowed with kind={self.kind!r}: only with {RATIO!r}")
        if not self.reference:
            object.__setattr__(self, "reference", self.name.split(".")[0])

    @property
    def cadence(self) -> Cadence:
        return Cadence(self.every_steps, self.jittered)


def with_ratio(residual: Signal, law: Law | None = None, universal: bool = False) -> tuple[Signal, Signal]:
    """A residual, and its ratio to what rounding alone predicts: ``<residual>.over_noise``."""
    name = f"{residual.name}.{OVER_NOISE}"
    return residual, replace(residual, name=name, unit="1", kind=RATIO, law=law, universal=universal)


def read_signal(description: Mapping[str, Any]) -> Signal:
    """A signal from what ``dataclasses.asdict`` made of it and JSON kept. Raises TypeError or ValueError on others."""
    law = description.get("law")
    return Signal(**{**description, "axes": tuple(description["axes"]), "law": None if law is None else Law(**law)})
