"""What a Triton attention kernel is told of a layer's faults and its mask: the host side of ``models.flash_sites``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from foreshock.models.bits import GOLDEN
from foreshock.models.numerics import CAUSAL_SITES, KEY_VALUE_SITES, SITES, LayerNumerics

OPERATION_NUMBERS = {"truncate": 1, "round_half_up": 2, "flip": 3}
"""Name in ``models.bits.ROUNDINGS`` -> the number that a kernel is compiled for, up to 7; 0 is no operation."""

FORWARD, BACKWARD = 0, 1

MASK = len(SITES)
"""The number of the causal mask, after those of ``SITES``; its bits are the keys after its own that a query sees."""

EVERYWHERE = 2.0
"""In place of a ``reach``, above every place: the fault hits all that is seen, keys of a shifted mask included."""

_SHIFT = 1
_FLIP = OPERATION_NUMBERS["flip"]
_CAUSAL = tuple(SITES.index(site) for site in CAUSAL_SITES)

_PARTIAL = 8
_FIELDS = 5
_ALL_HEADS = -1


def encode(numerics: LayerNumerics) -> tuple[list[int], list[float]]:
    """A layer's faults as plain numbers, which is what ``torch.library`` operators take.

    Five integers for every fault and head: pass, site, operation, bits, head (-1: all); and the share of elements. A
    shifted mask is written as a fault of the site ``MASK`` in both passes.
    """
    numbers, shares, wiring = [], [], numerics.wiring
    if wiring.mask_shift:
        for pass_ in (FORWARD, BACKWARD):
            for head in _numbers_of(wiring.heads):
                numbers += [pass_, MASK, _SHIFT, wiring.mask_shift, head]
                shares.append(1.0)
    for (site, phase), faults in numerics.items():
        for fault in faults:
            for head in _numbers_of(fault.heads):
                pass_ = FORWARD if phase == "forward" else BACKWARD
                numbers += [pass_, SITES.index(site), OPERATION_NUMBERS[fault.rounding], fault.bits, head]
                shares.append(float(fault.share))
    return numbers, shares


def _numbers_of(heads: tuple[int, ...] | None) -> tuple[int, ...]:
    return (_ALL_HEADS,) if heads is None else heads


def _decode(numbers: Sequence[int], shares: Sequence[float]) -> Iterator[tuple[int, int, int, int, int, float]]:
    for i, share in enumerate(shares):
        yield (*numbers[_FIELDS * i : _FIELDS * (i + 1)], share)  # type: ignore[misc]  # mypy does not count a slice


def constants(numbers: Sequence[int], shares: Sequence[float], wanted_pass: int) -> int:
    """What a kernel of this pass is compiled for: four bits a site and the mask, the lowest for the first of ``SITES``.

    Read by the functions below; 0 without faults and with the right mask. Raises ValueError where two operations meet
    on a site.
    """
    code = 0
    for pass_, site, number, _, _, share in _decode(numbers, shares):
        if pass_ == wanted_pass:
            if operation(code, site) not in (0, number):
                raise ValueError(f"site {SITES[site]!r}: the Triton kernel does one rounding a pass to all its heads")
            code |= (number + _PARTIAL * (share < 1)) << (4 * site)
    return code


def operation(code: int, site: int) -> int:
    """The operation done at the site of this index, 0 if none."""
    return code >> (4 * site) & (_PARTIAL - 1)


def is_partial(code: int, site: int) -> bool:
    """Whether some fault of the site hits only a share of the elements."""
    return bool(code >> (4 * site) & _PARTIAL)


# Kernels are compiled with the next two, which Triton lets call no other function.
def shifts_mask(code: int) -> bool:
    """Whether queries of some head see keys after their own."""
    return code >> (4 * MASK) != 0


def spares_later_keys(code: int, site: int) -> bool:
    """Whether some fault of the site passes over the keys after a query's own, which a shifted mask lets it see.

    As in ``models.bits.BitOperation.hits``: a flipped bit and a share of the elements are of right keys.
    """
    chosen = code >> (4 * site) & (2 * _PARTIAL - 1)
    of_right_keys = chosen >= _PARTIAL or chosen == _FLIP
    return code >> (4 * MASK) != 0 and of_right_keys and site in _CAUSAL


@dataclass(frozen=True)
class AttentionShape:
    """The sizes that decide which elements a share of a tensor is. window: 0 for none."""

    n_heads: int
    n_kv_heads: int
    tokens: int
    d_head: int
    window: int

    def heads(self, site: str) -> int:
        return self.n_kv_heads if site in KEY_VALUE_SITES else self.n_heads

    def elements(self, site: str) -> Iterator[np.ndarray]:
        """The numbers of one batch row's and head's elements, some rows at a time; of scores, those of right keys."""
        width = {"lse": 1, "delta": 1}.get(site, self.tokens if site in CAUSAL_SITES else self.d_head)
        column = np.arange(width)[None, :]
        for first in range(0, self.tokens, 64):
            row = np.arange(first, min(first + 64, self.tokens))[:, None]
            number = row * width + column
            if site in CAUSAL_SITES:
                number = number[(column <= row) & (column > row - (self.window or self.tokens))]
            yield number


@lru_cache(maxsize=256)
def reach(share: float, site: str, shape: AttentionShape) -> float:
    """The largest place of an element that a fault hits: its share, or the smallest place there is if that is larger.

    Places as in ``models.bits``: the fractional part of (number + 1/2) golden ratios, FP64.
    """
    smallest = 1.0
    for number in shape.elements(site):
        smallest = min(smallest, ((number + 0.5) * GOLDEN % 1).min().item())
        if smallest <= share:
            return share
    return smallest


@lru_cache(maxsize=256)
def fault_table(
    numbers: tuple[int, ...], shares: tuple[float, ...], shape: AttentionShape, device: torch.device
) -> Tensor:
    """(2 passes, sites and mask, 2, n_heads) in FP64: each head's bits, 0 if it is healthy, then its ``reach``.

    ``EVERYWHERE`` stands for the reach of a fault that hits all that is seen. Of the mask, bits are keys.
    Built once: later steps copy nothing to the device, so that CUDA graphs can be captured.
    Raises ValueError if a fault names a head that the site does not have.
    """
    names = (*SITES, "mask")
    table = torch.zeros(2, len(names), 2, shape.n_heads, dtype=torch.float64)
    for pass_, index, number, bits, head, share in _decode(numbers, shares):
        site = names[index]
        count = shape.heads(site)
        if head >= count:
            raise ValueError(f"heads=[{head}] does not fit site {site!r}: it has {count}, 0 to {count - 1}")
        heads = slice(0, count) if head == _ALL_HEADS else head
        table[pass_, index, 0, heads] = bits
        everywhere = share == 1 and not (site in CAUSAL_SITES and number == _FLIP)
        table[pass_, index, 1, heads] = EVERYWHERE if everywhere else reach(share, site, shape)
    return table.to(device)
