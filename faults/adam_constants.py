"""Wrong constants of Adam: beta_1, beta_2 or epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import Operation, Training
from foreshock.faults.optimizer_update import Update
from foreshock.models.transformer import TransformerConfig

EPSILON = 1e-8
"""Adam's epsilon in a healthy run, PyTorch's default."""


@dataclass(frozen=True)
class SetAdamConstants(Operation):
    """Give every parameter group these constants for one update; None leaves a constant as it is."""

    stackable: ClassVar[bool] = False

    beta1: float | None
    beta2: float | None
    epsilon: float | None

    @property
    def _constants(self) -> tuple[float | None, float | None, float | None]:
        return self.beta1, self.beta2, self.epsilon

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        healthy = (*train.betas, EPSILON)
        if all(new in (None, old) for new, old in zip(self._constants, healthy, strict=True)):
            beta1, beta2, epsilon = healthy
            raise ValueError(
                f"fault.beta1={self.beta1}, fault.beta2={self.beta2}, fault.epsilon={self.epsilon} change nothing: "
                f"the run has {beta1}, {beta2} and {epsilon}"
            )

    def meets(self, other: Any) -> bool:
        return isinstance(other, SetAdamConstants) and any(
            None not in pair for pair in zip(self._constants, other._constants, strict=True)
        )

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        update.set_constants(self, self._changed)
        yield

    def _changed(self, group: dict[str, Any]) -> dict[str, Any]:
        beta1, beta2, epsilon = (
            old if new is None else new
            for new, old in zip(self._constants, (*group["betas"], group["eps"]), strict=True)
        )
        return {"betas": (beta1, beta2), "eps": epsilon}


@dataclass(frozen=True)
class AdamConstants(OperationFault):
    """Adam with other constants at the steps of a window.

    What breaks: an optimizer's configuration that was mistyped, lost at a resume or read from another file.
    Equations (arXiv:1412.6980), with the wrong constants in all three, bias correction included, whose power is the
    number of all updates so far: m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2;
    w <- w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon). After the window the constants are the run's
    again, and the moments what they have become. It does not model constants that differ between parameter groups.

    beta1, beta2: from 0 to below 1; epsilon: 0 or more; None leaves a constant as it is, and at least one is given.
    Raises ValueError on impossible values, by name, and before training where the run has these very constants.
    """

    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            if beta is not None and not 0 <= beta < 1:
                raise ValueError(f"fault.{name}={beta} is not allowed: from 0 to below 1, or null for the run's own")
        if self.epsilon is not None and not 0 <= self.epsilon < math.inf:
            raise ValueError(f"fault.epsilon={self.epsilon} is not allowed: 0 or more, or null for the run's own")
        if self.beta1 is None and self.beta2 is None and self.epsilon is None:
            raise ValueError("fault.beta1=None, fault.beta2=None and fault.epsilon=None: give at least one of them")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (SetAdamConstants(self.beta1, self.beta2, self.epsilon),), self.window)

    def describe(self) -> InjectionCard:
        size = {"beta1": self.beta1, "beta2": self.beta2, "epsilon": self.epsilon}
        return InjectionCard(self.family, (self.injection("set", {"point": "optimizer"}, size),))
