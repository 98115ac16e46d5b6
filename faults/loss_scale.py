"""What may happen to the scale of an FP16 loss between two updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foreshock.faults.operation import Operation, Training
from foreshock.models.transformer import TransformerConfig

SMALLEST, LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127
"""Of the normal FP32 numbers, in which the scale is stored."""


@dataclass(frozen=True)
class ScaleOperation(Operation):
    """The loss scale times ``factor``, above 0, before an update; 1 changes nothing."""

    stackable: ClassVar[bool] = False

    factor: float

    @property
    def idle(self) -> bool:
        return self.factor == 1

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if train.precision != "fp16":
            raise ValueError(
                f"fault: a change of the loss scale needs train.precision=fp16, and the run has "
                f"train.precision={train.precision}"
            )

    def apply(self, scale: float) -> float:
        """The new scale; the old one where that would be no FP32 number, as PyTorch's own growth has it."""
        changed = scale * self.factor
        return changed if SMALLEST <= changed <= LARGEST else scale
