"""A causal mask that is shifted: the label leaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.models.numerics import AttentionNumerics
from foreshock.models.wiring import Wiring


@dataclass(frozen=True)
class MaskShift(OperationFault):
    """Each query sees some keys after its own, at the steps of a window.

    What breaks: a causal mask built with the wrong diagonal, or of the wrong length. Reports: huggingface/transformers
    #31673; keras #23038. Equation: query i sees key j where i - window < j <= i + shift, in forward and backward. From
    shift 1 on, a position reads the token that it is to predict, and the loss falls below that of any honest model;
    held-out losses that are taken while the fault acts fall with it. A mask that is missing whole is a shift of the
    context length less 1; one of padding is not modelled. Monitors that compute attention again do it with the right
    mask, so that they see it. A flipped bit, or an operation on a share of ``s p dp ds``, in the same layer hits right
    keys alone.

    shift: 0, the healthy control, to below the context length; layers, heads (query heads): indices, or None for all.
    Raises ValueError on impossible values, by name.
    """

    shift: int
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    @cached_property
    def corrupt(self) -> Corrupt:
        wiring = Wiring(mask_shift=self.shift, heads=self.heads, layers=self.layers)
        return Corrupt("numerics", AttentionNumerics(wirings=(wiring,)), self.window)

    def describe(self) -> InjectionCard:
        reach = {"phase": "both", "layers": self.layers, "heads": self.heads}
        where = {"point": "numerics", "tensors": ("s",), **reach}
        injection = self.injection("shift_mask", where, {"shift": self.shift}, control=self.shift == 0)
        return InjectionCard(self.family, (injection,))
