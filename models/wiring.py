"""Attention that is computed right, of the wrong things: a shifted mask, another scale, the wrong key-value head.

Shapes as in ``models.attention``. In place of S = Q K^T / sqrt(D), masked where j > i, query head h with key-value head
g = h // (H/G), a wrong wiring has

    S = Q K^T / sqrt(D)^scalings,   masked where j > i + mask_shift,   g = (h // (H/G) + kv_offset) mod G

in forward and backward alike, as where the model's code has the mistake: the gradient is the exact one of what was
computed. A tap sees q, k and v as they enter and O as it leaves, so that a monitor which computes attention again does
it as it ought to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

MOST_SCALINGS = 4


@dataclass(frozen=True)
class Wiring:
    """What attention is computed of. The defaults are right.

    mask_shift: how many later keys a query sees, 0 or more; the first key of a sliding window stays; heads: query heads
    whose mask is shifted, or None for all; scalings: how often 1 / sqrt(D) is applied, 0 to 4; kv_offset: how many
    key-value heads further a query head reads, 0 or more; layers: indices, or None for all.
    Raises ValueError on impossible values, by name.
    """

    mask_shift: int = 0
    scalings: int = 1
    kv_offset: int = 0
    heads: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.mask_shift < 0:
            raise ValueError(f"fault.shift={self.mask_shift} is not allowed: 0 (the healthy control) or more")
        if not 0 <= self.scalings <= MOST_SCALINGS:
            raise ValueError(f"fault.times={self.scalings} is not allowed: 0 to {MOST_SCALINGS}; 1 is right")
        if self.kv_offset < 0:
            raise ValueError(f"fault.offset={self.kv_offset} is not allowed: 0 (the healthy control) or more")
        for field, chosen in (("layers", self.layers), ("heads", self.heads)):
            if chosen is not None and (len(set(chosen)) != len(chosen) or not chosen or min(chosen) < 0):
                raise ValueError(
                    f"fault.{field}={list(chosen)} is not allowed: distinct indices from 0, or null for all"
                )

    @property
    def wrong(self) -> frozenset[str]:
        """What differs from right attention."""
        return frozenset(name for name in CHANGES if getattr(self, name) != getattr(RIGHT, name))

    def meets(self, other: Wiring) -> bool:
        """Whether both change one thing in one layer."""
        apart = None not in (self.layers, other.layers) and not set(self.layers or ()) & set(other.layers or ())
        return bool(self.wrong & other.wrong) and not apart

    def scale(self, d_head: int) -> float:
        """Of Q K^T."""
        return 1.0 / math.sqrt(d_head) ** self.scalings

    def rewired(self, x_BGTD: Tensor) -> Tensor:
        """Keys or values, each head in the place from which it is read."""
        return x_BGTD.roll(-self.kv_offset, dims=1) if self.kv_offset else x_BGTD

    def check_fits(self, n_layers: int, n_heads: int, kv_heads: int, context_length: int) -> None:
        """Raise ValueError that names the field where a model cannot have it."""
        for field, chosen, count in (("layers", self.layers, n_layers), ("heads", self.heads, n_heads)):
            if chosen is not None and max(chosen) >= count:
                raise ValueError(
                    f"fault.{field}={list(chosen)} does not fit the model: it has {count} {field}, 0 to {count - 1}"
                )
        if self.mask_shift >= context_length:
            raise ValueError(
                f"fault.shift={self.mask_shift} does not fit the model: below model.context_length={context_length}"
            )
        if self.kv_offset >= kv_heads:
            raise ValueError(
                f"fault.offset={self.kv_offset} does not fit the model: it has {kv_heads} key-value heads, "
                f"so that offsets are 0 to {kv_heads - 1}"
            )
        if self.kv_offset and kv_heads == n_heads:
            raise ValueError(
                "fault.offset needs query heads in groups: model.n_kv_heads below model.n_heads, as model=gqa_nano has"
            )


CHANGES = tuple(field.name for field in fields(Wiring) if field.name not in ("heads", "layers"))
RIGHT = Wiring()


def wiring_of(layer: int, wirings: Iterable[Wiring]) -> Wiring:
    """What one layer's attention is computed of; no two of the wirings meet."""
    total = RIGHT
    for wiring in wirings:
        if wiring.wrong and (wiring.layers is None or layer in wiring.layers):
            changed: dict[str, Any] = {name: getattr(wiring, name) for name in wiring.wrong}
            total = replace(total, **changed, heads=wiring.heads if wiring.mask_shift else total.heads)
    return total
