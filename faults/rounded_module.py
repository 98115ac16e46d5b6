"""A module's output or gradient in a lower format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.rounded_tensor import RoundedTensor


@dataclass(frozen=True)
class RoundedModule(OperationFault):
    """One tensor of each named module rounded to a lower format, at the steps of a window.

    What breaks: a module that ought to run in FP32 and does not: the router's logits, the statistics of a norm, the
    logits, the rotary embedding, the token embedding, the residual stream. Report: databricks/megablocks #91.
    Equation: x <- fl(x) with fl the rounding to nearest, ties to even; no bits are cleared. FP8 saturates and has no
    scale. A rounded output takes the gradient of the exact one. With site ``statistics``, a norm's mean and reciprocal
    deviation are rounded, the rest of the norm is FP32 and its backward that of exact statistics. Products whose
    inputs are rounded, and sums in a lower format, are not modelled. Taps see the rounded output, so that the laws of
    linear layers and norms have it as an error.

    modules: ``head`` (logits), ``tokens``, ``blocks.0`` (the residual stream after that block),
    ``blocks.0.mlp.router``, ``blocks.0.attention.rotary``, ``final_norm`` and all that ``module_shift`` takes; site:
    ``y dy dx dw`` as there, or ``statistics``; format: ``bf16``, ``fp16``, ``fp8_e4m3``, ``fp8_e5m2``, or ``fp32``, the
    healthy control. Raises ValueError on impossible values, by name.
    """

    modules: tuple[str, ...]
    site: str
    format: str

    def __post_init__(self) -> None:
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules={list(self.modules)} is not allowed: distinct names, at least one")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        changes = (RoundedTensor(name, self.site, self.format) for name in self.modules)
        return Corrupt("modules", tuple(changes), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "modules", "modules": self.modules, "tensor": self.site}
        injection = self.injection("round", where, {"format": self.format}, control=self.format == "fp32")
        return InjectionCard(self.family, (injection,))
