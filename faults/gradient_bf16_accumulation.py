"""Gradients of micro-batches added up in a narrow format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.of_group import OfGroup
from foreshock.faults.operation import Moment, Training
from foreshock.faults.rounding import check_format, nearest
from foreshock.models.transformer import TransformerConfig


@dataclass(frozen=True)
class RoundedSum(OfGroup):
    """The sum of gradients rounded to a format after each micro-batch."""

    stackable: ClassVar[bool] = False

    form: str

    @property
    def idle(self) -> bool:
        return self.form == "fp32"

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        at_a_time = train.micro_batch or train.batch_size
        if (train.watched_sequences or at_a_time) == train.batch_size:
            raise ValueError(
                f"fault: a sum over micro-batches needs at least two, and train.micro_batch={train.micro_batch} leaves "
                f"the {train.batch_size} sequences of a batch in one: set train.micro_batch below train.batch_size"
            )

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        return nearest(x, self.form)


@dataclass(frozen=True)
class GradientBF16Accumulation(OperationFault):
    """The gradients of micro-batches are added up in BF16, or narrower, at the steps of a window.

    What breaks: a gradient buffer in the parameters' format, in which a small micro-batch's share of a large sum is
    lost. Report: DeepSpeed #2768.
    Equation: a_0 = 0, a_k <- round(a_(k-1) + w_k g_k) for micro-batches k = 1 to K, with the weights of
    ``experiments.training.gradients``; the quotient by the batch is FP32, as in health. The gradient of one micro-batch
    is not rounded by itself, which a backward pass in BF16 would do too.

    format: of ``faults.rounding.FORMATS``, ``fp32`` the healthy control. Raises ValueError on impossible values, by
    name, and before training where a batch is one micro-batch.
    """

    format: str = "bf16"

    def __post_init__(self) -> None:
        check_format(self.format)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("accumulation", (RoundedSum(None, self.format),), self.window)

    def describe(self) -> InjectionCard:
        where, size = {"point": "accumulation", "group": None}, {"format": self.format}
        return InjectionCard(self.family, (self.injection("round", where, size, control=self.format == "fp32"),))
