"""BF16 bit shift of a module's output or gradients: broken kernels outside attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from faults.base import Sites, Window
from models.corruption import ModuleFault


@dataclass(frozen=True)
class ModuleShift:
    """A bit operation on one tensor of each named module at the steps of a window.

    modules: names as in ``named_modules()``, such as ``blocks.0.attention.q``, ``blocks.1.mlp.router``,
    ``final_norm`` or ``head``; site: ``y`` (output), ``dy`` (the gradient that arrives there: of ``head``, what a
    broken loss kernel computed), ``dx`` (the gradient handed to the input), ``dw`` (the weight's gradient:
    of a tied ``head``, what its own product adds to it); rounding, bits, share: see ``models.bits.BitOperation``;
    onset: first faulty update; duration: updates, or None for no end. Raises ValueError on impossible values, by name.
    """

    modules: tuple[str, ...]
    site: str
    bits: int
    rounding: str = "truncate"
    share: float = 1.0
    onset: int = 0
    duration: int | None = None

    def __post_init__(self) -> None:
        if not self.modules or len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules={list(self.modules)} is not allowed: distinct names, at least one")
        self.corrupted, self.window  # noqa: B018  (building them checks every field)

    @cached_property
    def window(self) -> Window:
        return Window(self.onset, self.duration)

    @cached_property
    def corrupted(self) -> tuple[ModuleFault, ...]:
        return tuple(ModuleFault(name, self.site, self.rounding, self.bits, self.share) for name in self.modules)

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        return replace(healthy, modules=healthy.modules + self.corrupted)
