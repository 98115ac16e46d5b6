"""What a Triton attention kernel is told about the faults of a layer: the host side of ``models.flash_sites``."""

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

_PARTIAL = 8
_FIELDS = 5
_ALL_HEADS = -1


def encode(numerics: LayerNumerics) -> tuple[list[int], list[float]]:
    """A layer's faults as plain numbers, which is what ``torch.library`` operators take.

    Five integers for every fault and head: pass, site, operation, bits, head (-1: all); and the share of elements.
    """
    numbers, shares = [], []
    for (site, phase), faults in numerics.items():
        for fault in faults:
            for head in (_ALL_HEADS,) if fault.heads is None else fault.heads:
                pass_ = FORWARD if phase == "forward" else BACKWARD
                numbers += [pass_, SITES.index(site), OPERATION_NUMBERS[fault.rounding], fault.bits, head]
                shares.append(float(fault.share))
    return numbers, shares


def _decode(numbers: Sequence[int], shares: Sequence[float]) -> Iterator[tuple[int, int, int, int, int, float]]:
    for i, share in enumerate(shares):
        yield (*numbers[_FIELDS * i : _FIELDS * (i + 1)], share)  # type: ignore[misc]  # mypy does not count a slice


def constants(numbers: Sequence[int], shares: Sequence[float], wanted_pass: int) -> int:
    """What a kernel of this pass is compiled for: four bits for each of ``SITES``, the lowest for the first.

    Read by ``operation`` and ``is_partial``; 0 without faults. Raises ValueError where two operations meet on a site.
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
        """The numbers of the elements of one batch row and head that a fault can hit, some rows at a time."""
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
    """(2 passes, sites, 2, n_heads) in FP64: each head's bits, 0 if it is healthy, then its ``reach``.

    Built once: later steps copy nothing to the device, so that CUDA graphs can be captured.
    Raises ValueError if a fault names a head that the site does not have.
    """
    table = torch.zeros(2, len(SITES), 2, shape.n_heads, dtype=torch.float64)
    for pass_, index, _, bits, head, share in _decode(numbers, shares):
        site = SITES[index]
        count = shape.heads(site)
        if head >= count:
            raise ValueError(f"heads=[{head}] does not fit site {site!r}: it has {count}, 0 to {count - 1}")
        heads = slice(0, count) if head == _ALL_HEADS else head
        table[pass_, index, 0, heads] = bits
        table[pass_, index, 1, heads] = reach(share, site, shape)
    return table.to(device)
