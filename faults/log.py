"""The injection log: what a fault really changed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

MEASURED_STEPS = 10
"""Faulty steps in which an operation's changes to a tensor are measured; later ones cost nothing."""
EVERY_STEP = ("clip", "system")
"""Points at which every faulty step is measured: such faults change few of them, and few numbers."""


@dataclass
class Change:
    """What an operation did to one tensor in the steps that were measured.

    steps: their number; last_step: the latest of them; elements: how many elements it changed; squares: the sum of the
    squared changes.
    """

    steps: int = 0
    last_step: int = -1
    elements: Tensor | int = 0
    squares: Tensor | float = 0.0


class InjectionLog:
    """The changes of one run by point, operation and tensor, counted on the device without waiting for it.

    step: the update that is under way (from 0), which the training loop keeps up to date.
    """

    def __init__(self) -> None:
        self.step = 0
        self._changes: dict[tuple[str, str, str], Change] = {}

    def wants(self, point: str, operation: Any, tensor: str) -> bool:
        """Whether a change would still be measured."""
        change = self._changes.get((point, str(operation), tensor))
        if change is None or point in EVERY_STEP:
            return True
        return change.steps < MEASURED_STEPS or change.last_step == self.step

    def add(self, point: str, operation: Any, tensor: str, before: Tensor, after: Tensor) -> None:
        """Count the elements that differ. A NaN that stays a NaN is no change."""
        if not self.wants(point, operation, tensor):
            return
        change = self._changes.setdefault((point, str(operation), tensor), Change())
        if change.last_step != self.step:
            change.steps, change.last_step = change.steps + 1, self.step
        differs = (before != after) & ~(before.isnan() & after.isnan())
        change.elements = change.elements + differs.sum()
        difference = torch.where(differs, after.double() - before.double(), 0.0)
        change.squares = change.squares + difference.square().sum()

    def check(self, ended: bool) -> None:
        """Raise ValueError for an operation that has changed nothing, once it is measured or the run has ended."""
        for (point, operation), keys in groupby(sorted(self._changes), key=lambda key: key[:2]):
            changes = [self._changes[key] for key in keys]
            enough = point not in EVERY_STEP and all(change.steps == MEASURED_STEPS for change in changes)
            measured = ended or enough
            if measured and not any(int(change.elements) for change in changes):
                steps = max(change.steps for change in changes)
                raise ValueError(
                    f"fault: {operation} at {point!r} changed no element in its first {steps} steps: "
                    "this run is no faulty one"
                )

    def entries(self) -> list[dict[str, Any]]:
        """By point, operation and tensor: the measured steps, the changed elements and the norm of the change."""
        return [
            {
                "point": point,
                "operation": operation,
                "tensor": tensor,
                "steps": change.steps,
                "elements": int(change.elements),
                "norm": float(change.squares) ** 0.5,
            }
            for (point, operation, tensor), change in sorted(self._changes.items())
        ]

    def state_dict(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        return {key: vars(change).copy() for key, change in self._changes.items()}

    def load_state_dict(self, state: dict[tuple[str, str, str], dict[str, Any]]) -> None:
        self._changes = {key: Change(**change) for key, change in state.items()}
