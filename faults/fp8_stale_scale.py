"""FP8 products whose scale is of earlier updates, or wrong by a factor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt
from foreshock.faults.fp8_linear import MOST_UPDATES, FP8Fault
from foreshock.faults.operation import Training

MOST_FACTOR = 1e9


@dataclass(frozen=True, kw_only=True)
class FP8StaleScale(FP8Fault):
    """The recipe of ``fp8_linear`` with a scale that lags, or is wrong by a factor, at the steps of a window.

    What breaks: scales that are not updated, or made of the wrong amaxes, so that large numbers saturate or small ones
    vanish. Reports: NVIDIA/TransformerEngine #1047; Megatron-LM #442 (amaxes of a wrong group of ranks, divergence).
    Equation: s_t = factor x largest / amax, of update t - lag with current scaling, and with delayed scaling of the
    last ``history`` updates that are at least ``lag`` older than those of the recipe. While the window is younger
    than that, the oldest amax that is known; before any is, the recipe's own scale. All else, and what is not modelled,
    is as in ``fp8_linear``; every tensor's scale lags alike.

    lag: updates; factor: above 1 numbers saturate, below 1 they vanish. With lag 0 and factor 1 it is ``fp8_linear`` of
    the same keys bit for bit, and that recipe's control; the other keys are as there. A lag with factor 1 shows from
    the second faulty update on, with delayed scaling from the third, and a window of fewer is refused. Raises
    ValueError on impossible values, by name.
    """

    lag: int = 0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.lag <= MOST_UPDATES:
            raise ValueError(f"fault.lag={self.lag} is not allowed: 0 (the recipe itself) to {MOST_UPDATES} updates")
        if not 1 / MOST_FACTOR <= self.factor <= MOST_FACTOR:
            allowed = f"{1 / MOST_FACTOR:g} to {MOST_FACTOR:g}, 1 for the recipe itself"
            raise ValueError(f"fault.factor={self.factor} is not allowed: {allowed}")
        super().__post_init__()

    @property
    def control(self) -> bool:
        """Whether it is the recipe itself, or nothing at all."""
        return self.format == "fp32" or (self.lag == 0 and self.factor == 1)

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("formats", (self.products(self.lag, self.factor),), self.window)

    def check_begins(self, train: Training) -> None:
        # before the first faulty update no amax is known; before the second one is, which a delayed recipe uses too
        needed = 1 if self.factor != 1 else 2 if self.scaling == "current" else 3
        faulty = sum(step in self.window for step in range(self.window.first, train.steps))
        if faulty < needed:
            raise ValueError(
                f"fault.lag={self.lag} has no effect: with fault.factor=1 and fault.scaling={self.scaling!r} it needs "
                f"at least {needed} faulty updates before train.steps={train.steps}, and the window has {faulty}"
            )

    def describe(self) -> InjectionCard:
        size = {**self.size, "lag": self.lag, "factor": self.factor}
        return InjectionCard(self.family, (self.injection("stale_scale", self.where, size, control=self.control),))
