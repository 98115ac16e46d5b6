"""BF16 bit shift of attention tensors: the numeric fault of arXiv:2606.28116."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from faults.base import Sites, Window
from models.numerics import AttentionNumerics, SiteFault


@dataclass(frozen=True)
class BF16Shift:
    """Clear the ``bits`` lowest bits of each named attention tensor at the steps of a window.

    Equation: ``raw & (-1 << bits)`` on the 16-bit integer of each BF16 number; with rounding
    ``round_half_up`` half of the last kept bit is added first; ``flip`` inverts the ``bits``-th bit alone
    (models/bits.py).
    Source: arXiv:2606.28116 and its authors' design notes.

    tensors (YAML key ``sites``): names in ``models.numerics.SITES``; phase: ``forward``, ``backward``
    or ``both``; bits: 0 to 8 (``flip``: 16), 0 being the healthy control on the same kernel; share: of the elements
    of each batch row and head, 0 for one; layers, heads: indices or None for all, heads being key-value heads for
    ``k v dk dv``; onset: first faulty update; duration: updates, or None for no end.
    Raises ValueError on impossible values, by name.
    """

    tensors: tuple[str, ...] = field(metadata={"key": "sites"})
    bits: int
    rounding: str = "truncate"
    phase: str = "backward"
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    share: float = 1.0
    onset: int = 0
    duration: int | None = None

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("sites=[] is not allowed: name at least one attention tensor")
        self.numerics, self.window  # noqa: B018  (building them checks every field)

    @cached_property
    def window(self) -> Window:
        return Window(self.onset, self.duration)

    @cached_property
    def numerics(self) -> AttentionNumerics:
        return AttentionNumerics(
            tuple(
                SiteFault(site, self.phase, self.rounding, self.bits, self.layers, self.heads, self.share)
                for site in self.tensors
            )
        )

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        return replace(healthy, numerics=healthy.numerics | self.numerics)
