"""Targets shifted by too many positions or too few."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import BatchOperation, Moment, Training
from foreshock.models.batch import IGNORED
from foreshock.models.transformer import TransformerConfig


@dataclass(frozen=True)
class ShiftedTargets(BatchOperation):
    """y_t <- the token ``shift`` positions after the right target, or no target where the sequence has none there."""

    changes: ClassVar[tuple[str, ...]] = ("targets",)

    shift: int

    @property
    def idle(self) -> bool:
        return self.shift == 0

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if abs(self.shift) >= model.context_length:
            raise ValueError(
                f"fault.shift={self.shift} leaves no target: its size must be below "
                f"model.context_length={model.context_length}"
            )

    def apply(self, pair_B2T: Tensor, moment: Moment) -> Tensor:
        inputs, targets = pair_B2T.unbind(1)
        tokens_BT1 = torch.cat((inputs[:, :1], targets), dim=1)
        T = targets.shape[1]
        shifted = torch.full_like(targets, IGNORED)
        first, last = max(0, -1 - self.shift), min(T, T - self.shift)  # of the positions that have a target
        shifted[:, first:last] = tokens_BT1[:, first + 1 + self.shift : last + 1 + self.shift]
        return torch.stack((inputs, shifted), dim=1)


@dataclass(frozen=True)
class LabelShift(OperationFault):
    """The model learns to predict the token some positions too far or too near, at the steps of a window.

    What breaks: labels that the collator has shifted and the model shifts again (shift 1), or that nobody shifts
    (shift -1, where the target is the input itself). No public report is named.
    Equation: y_t = x_(t + 1 + shift) for positions t = 0 to T - 1. The sequence has tokens x_0 to x_T: positions whose
    target would lie outside it have none (``models.batch.IGNORED``), as where a collator fills up with -100, and the
    loss is the mean over the others. Inputs and the held-out batch stay right.

    shift: positions, 0 the healthy control; its size is below the context length.
    Raises ValueError on impossible values, by name.
    """

    shift: int

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("batch", (ShiftedTargets(self.shift),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "batch", "tensors": ShiftedTargets.changes}
        injection = self.injection("shift", where, {"shift": self.shift}, control=self.shift == 0)
        return InjectionCard(self.family, (injection,))
