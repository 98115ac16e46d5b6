"""Rotary phases in BF16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.rotary_format import RotaryFormat


@dataclass(frozen=True)
class RopeBF16(OperationFault):
    """The phases of rotary embeddings are computed in a lower format, in every layer, at the steps of a window.

    What breaks: positions and frequencies that autocast or a loaded checkpoint has made BF16. Report:
    huggingface/transformers #29285. Equation: angle = fl(fl(t) fl(base^(-2i / d))) with fl the rounding to the format;
    cosine and sine are taken of it in FP32. BF16 has 8 significant bits: positions above 256 share their phases with
    neighbours, and below that every phase but the fastest, whose frequency is 1, errs by up to some t 2^-8. The
    rotation itself stays in FP32, and the gradient is that of the rotation that was done. No law of linear layers or
    attention sees it: queries and keys are wrong before they enter, so that a loss by position has to.

    format: ``bf16``, ``fp16``, or ``fp32``, the healthy control. Raises ValueError on impossible values, by name.
    """

    format: str = "bf16"

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("modules", (RotaryFormat(self.format),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "modules", "modules": None, "tensor": "rotary phases"}
        injection = self.injection("round", where, {"format": self.format}, control=self.format == "fp32")
        return InjectionCard(self.family, (injection,))
