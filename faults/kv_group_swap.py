"""Grouped query heads that read the wrong key-value head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.models.numerics import AttentionNumerics
from foreshock.models.wiring import Wiring


@dataclass(frozen=True)
class KVGroupSwap(OperationFault):
    """Each group of query heads reads the key-value head of another group, at the steps of a window.

    What breaks: key-value heads that are repeated in another order than that of the query heads, or shards of them
    that are exchanged. No public report is named. Equation: query head h of H reads key-value head
    (h // (H / G) + offset) mod G, in forward and backward; the gradient goes to the head that was read. From the first
    step on it is another name for the same model; later it exchanges what heads have learnt. Heads that are
    repeated in turn (h mod G) are not modelled. Monitors that compute attention again give each query head its own
    key-value head, so that they see it.

    offset: 0, the healthy control, to below the key-value heads; layers: indices, or None for all.
    Raises ValueError on impossible values, by name.
    """

    offset: int = 1
    layers: tuple[int, ...] | None = None

    @cached_property
    def corrupt(self) -> Corrupt:
        wiring = Wiring(kv_offset=self.offset, layers=self.layers)
        return Corrupt("numerics", AttentionNumerics(wirings=(wiring,)), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "numerics", "tensors": ("k", "v"), "phase": "both", "layers": self.layers, "heads": None}
        injection = self.injection("swap_heads", where, {"offset": self.offset}, control=self.offset == 0)
        return InjectionCard(self.family, (injection,))
