"""Operations on the raw 16 bits of a BF16 number: 1 sign, 8 exponent and 7 mantissa bits.

The injected fault of arXiv:2606.28116 clears the ``k`` lowest bits: k = 1..7 shortens the mantissa, k = 8 also
clears the lowest exponent bit. A flipped bit is what silent data corruption leaves (Dixit et al., arXiv:2102.11245).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from foreshock.models.visibility import visible_keys

GOLDEN = (math.sqrt(5) - 1) / 2


def _as_bits(x: Tensor, bits: int, most: int) -> Tensor:
    if x.dtype is not torch.bfloat16:
        raise TypeError(f"a BF16 bit operation needs a torch.bfloat16 tensor, got {x.dtype}")
    _check_bits(bits, most)
    return x.view(torch.int16)


def _check_bits(bits: int, most: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= most:
        raise ValueError(f"bits={bits!r} is not allowed: an integer from 0 to {most}")


def truncate(x: Tensor, bits: int) -> Tensor:
    """Clear the ``bits`` lowest bits of each BF16 number: ``raw & (-1 << bits)``.

    Rounds finite numbers toward zero (arXiv:2606.28116, authors' design notes). A NaN whose
    payload lies in the cleared bits becomes Inf, and at 8 bits Inf becomes a finite number:
    count non-finite values first.

    x: BF16, any shape; bits: 0 to 8. Returns BF16 of the same shape; ``bits=0`` returns x.
    Raises TypeError on another dtype, ValueError on another number of bits.
    """
    raw = _as_bits(x, bits, MOST_BITS["truncate"])
    return x if bits == 0 else (raw & (-1 << bits)).view(torch.bfloat16)


def round_half_up(x: Tensor, bits: int) -> Tensor:
    """Add half of the last kept bit to the raw number, then truncate: ``(raw + 2**(bits-1)) & (-1 << bits)``.

    The low-bias control of ``truncate``: rounds to nearest with ties away from zero. The addition
    is modulo 2**16, so a carry may reach the exponent (a large number becomes Inf) and, from a
    NaN with a full mantissa, the sign.

    x: BF16, any shape; bits: 0 to 8. Returns BF16 of the same shape; ``bits=0`` returns x.
    Raises TypeError on another dtype, ValueError on another number of bits.
    """
    raw = _as_bits(x, bits, MOST_BITS["round_half_up"])
    return x if bits == 0 else ((raw + (1 << (bits - 1))) & (-1 << bits)).view(torch.bfloat16)


def flip(x: Tensor, bits: int) -> Tensor:
    """Invert one bit of each BF16 number, the ``bits``-th from below: ``raw ^ 2**(bits-1)``.

    1 to 7 are the mantissa's, 8 to 15 the exponent's, 16 is the sign; a flipped exponent may give Inf or NaN.

    x: BF16, any shape; bits: 0 to 16. Returns BF16 of the same shape; ``bits=0`` returns x.
    Raises TypeError on another dtype, ValueError on another number of bits.
    """
    raw = _as_bits(x, bits, MOST_BITS["flip"])
    if bits == 0:
        return x
    mask = -(1 << 15) if bits == 16 else 1 << (bits - 1)  # the sign bit of an int16 is -2^15
    return (raw ^ mask).view(torch.bfloat16)


ROUNDINGS: Mapping[str, Callable[[Tensor, int], Tensor]] = MappingProxyType(
    {"truncate": truncate, "round_half_up": round_half_up, "flip": flip}
)
MOST_BITS: Mapping[str, int] = MappingProxyType({"truncate": 8, "round_half_up": 8, "flip": 16})
"""The largest ``bits`` of each operation."""


@dataclass(frozen=True)
class BitOperation:
    """One of ``ROUNDINGS`` with its ``bits``, done to a share of a tensor's elements.

    share: 0 to 1 of the elements that the last dimensions hold, spread evenly and always the same ones, as a defect
    of the hardware hits them; 0 hits exactly one. Whoever applies it leaves it out at bits=0.
    Raises ValueError on impossible values, by name.
    """

    rounding: str
    bits: int
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r} is not allowed: one of {', '.join(ROUNDINGS)}")
        _check_bits(self.bits, MOST_BITS[self.rounding])
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} is not allowed: 0 (one element) to 1 (all)")

    def hits(
        self, shape: tuple[int, ...], device: torch.device, causal: bool = False, window: int | None = None
    ) -> Tensor | None:
        """Which elements of ``shape`` are hit, boolean, or None for all.

        causal: the last two dimensions are queries and keys, and only keys that a query sees within ``window`` are hit.
        All of them are told apart from all elements where it matters: a masked 0 stays 0 unless a bit is flipped.
        """
        everywhere = self.share == 1 and not (causal and self.rounding == "flip")
        return None if everywhere else _spread(tuple(shape), self.share, device, causal, window)

    def __call__(self, x: Tensor, hits: Tensor | None) -> Tensor:
        """x, FP32, rounded to BF16 and corrupted where it is hit; a new tensor. hits: boolean, broadcast over x."""
        corrupted = ROUNDINGS[self.rounding](x.bfloat16(), self.bits).to(x.dtype)
        return corrupted if hits is None else torch.where(hits, corrupted, x)


@lru_cache(maxsize=64)
def _spread(shape: tuple[int, ...], share: float, device: torch.device, causal: bool, window: int | None) -> Tensor:
    """A share of the elements, evenly: the i-th where the fractional part of (i + 1/2) golden ratios is small."""
    place = ((torch.arange(math.prod(shape), dtype=torch.float64) + 0.5) * GOLDEN % 1).view(shape)
    if causal:
        place = place.masked_fill(~visible_keys(shape[-1], window), 2.0)
    return (place <= max(share, place.min().item())).to(device)
