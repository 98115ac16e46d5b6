"""Activation checkpointing whose recomputed forward draws other masks of dropout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.layers import Layers
from foreshock.faults.recomputation import Recomputation


@dataclass(frozen=True)
class DropoutMismatch(OperationFault):
    """Blocks are checkpointed, and their recomputed forward draws other dropout masks, at the steps of a window.

    What breaks: activation checkpointing that does not keep the state of the random generator. Report:
    allenai/OLMo-core #828.
    Equation: the loss is L(x; m) with the masks m of the first forward; the backward of a block uses the activations
    and masks of a second one, from the same input with masks m' of the same rate, independent of m. So dx =
    J(x; m')^T dy, and each dW is the product of the second forward's activations and the gradients that m' lets
    through. The blocks really run under ``torch.utils.checkpoint`` without reentry. The embedding's own dropout is in
    no block and keeps its mask. Taps show the first forward, so that the laws of linear layers behind a mask inside
    the block see it; attention, which stands before one, computes the same again. What it is combined with is applied,
    and logged, in both forwards.

    layers: indices, or None for all; same: the second forward draws the masks of the first, the healthy control,
    which has the bits of a run that recomputes nothing. Raises ValueError on impossible layers, by name, and for a
    model without dropout.
    """

    layers: Layers = None
    same: bool = False

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("modules", (Recomputation(self.layers, self.same),), self.window)

    def describe(self) -> InjectionCard:
        blocks = None if self.layers is None else tuple(f"blocks.{layer}" for layer in self.layers)
        where = {"point": "modules", "modules": blocks, "tensor": "dropout masks"}
        injection = self.injection("redraw", where, {"same": self.same}, control=self.same)
        return InjectionCard(self.family, (injection,))
