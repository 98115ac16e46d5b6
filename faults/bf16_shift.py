"""BF16 bit shift of attention tensors: the numeric fault of arXiv:2606.28116."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.models.numerics import AttentionNumerics, SiteFault


@dataclass(frozen=True)
class BF16Shift(OperationFault):
    """Clear the ``bits`` lowest bits of each named attention tensor at the steps of a window.

    Equation: ``raw & (-1 << bits)`` on the 16-bit integer of each BF16 number; with rounding
    ``round_half_up`` half of the last kept bit is added first; ``flip`` inverts the ``bits``-th bit alone
    (models/bits.py).
    Source: arXiv:2606.28116 and its authors' design notes.

    tensors (YAML key ``sites``): names in ``models.numerics.SITES``; phase: ``forward``, ``backward``
    or ``both``; bits: 0 to 8 (``flip``: 16), 0 being the healthy control on the same kernel; share: of the elements
    of each batch row and head, 0 for one; layers, heads: indices or None for all, heads being key-value heads for
    ``k v dk dv``. Raises ValueError on impossible values, by name.
    """

    tensors: tuple[str, ...] = field(metadata={"key": "sites"})
    bits: int
    rounding: str = "truncate"
    phase: str = "backward"
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("sites=[] is not allowed: name at least one attention tensor")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        faults = (
            SiteFault(site, self.phase, self.rounding, self.bits, self.layers, self.heads, self.share)
            for site in self.tensors
        )
        return Corrupt("numerics", AttentionNumerics(tuple(faults)), self.window)

    def describe(self) -> InjectionCard:
        reach = {"phase": self.phase, "layers": self.layers, "heads": self.heads}
        where = {"point": "numerics", "tensors": self.tensors, **reach}
        size = {"bits": self.bits, "share": self.share}
        return InjectionCard(self.family, (self.injection(self.rounding, where, size, control=self.bits == 0),))
