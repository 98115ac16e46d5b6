"""BF16 bit shift of a module's output or gradients: broken kernels outside attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.models.corruption import ModuleFault


@dataclass(frozen=True)
class ModuleShift(OperationFault):
    """A bit operation on one tensor of each named module at the steps of a window.

    modules: names as in ``named_modules()``, such as ``blocks.0.attention.q``, ``blocks.1.mlp.router``,
    ``final_norm`` or ``head``; site: ``y`` (output), ``dy`` (the gradient that arrives there: of ``head``, what a
    broken loss kernel computed), ``dx`` (the gradient handed to the input), ``dw`` (the weight's gradient:
    of a tied ``head``, what its own product adds to it); rounding, bits, share: see ``models.bits.BitOperation``.
    Raises ValueError on impossible values, by name.
    """

    modules: tuple[str, ...]
    site: str
    bits: int
    rounding: str = "truncate"
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules={list(self.modules)} is not allowed: distinct names, at least one")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        faults = (ModuleFault(name, self.site, self.rounding, self.bits, self.share) for name in self.modules)
        return Corrupt("modules", tuple(faults), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "modules", "modules": self.modules, "tensor": self.site}
        size = {"bits": self.bits, "share": self.share}
        return InjectionCard(self.family, (self.injection(self.rounding, where, size, control=self.bits == 0),))
