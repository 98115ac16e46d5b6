"""What a Triton attention kernel is told about the faults of a layer: the host side of ``models.flash_sites``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from models.bits import GOLDEN
from models.numerics import CAUSAL_SITES, KEY_VALUE_SITES, SITES, LayerNumerics, SiteFault

OPERATION_NUMBERS = {"truncate": 1, "round_half_up": 2, "flip": 3}
"""Name in ``models.bits.ROUNDINGS`` -> the number that a kernel is compiled for; 0 is no operation."""

_PARTIAL = 8


def _digit(rounding: str, partial: bool, site: str) -> int:
    return (OPERATION_NUMBERS[rounding] + _PARTIAL * partial) << (4 * SITES.index(site))


def operation(faults: int, site: int) -> int:
    """The operation done at the site of this index, 0 if none. faults: as in ``KernelFaults``."""
    return faults >> (4 * site) & (_PARTIAL - 1)


def is_partial(faults: int, site: int) -> bool:
    """Whether some fault of the site hits only a share of the elements."""
    return bool(faults >> (4 * site) & _PARTIAL)


@dataclass(frozen=True, eq=False)
class KernelFaults:
    """The faults of one layer as kernels take them.

    forward, backward: four bits for each of ``SITES``, the lowest for the first, read by ``operation`` and ``is_partial``.
    table: (2 passes, sites, 2, n_heads) in FP64: each head's bits (0: healthy), then its reach, the largest place of
    an element that is hit.
    """

    forward: int
    backward: int
    table: Tensor


@dataclass(frozen=True)
class AttentionShape:
    """The sizes that decide which elements a share of a tensor is."""

    n_heads: int
    n_kv_heads: int
    tokens: int
    d_head: int
    window: int | None

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not allowed: a multiple of the {self.n_kv_heads} KV heads")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} is not allowed: 1 (a token sees itself) or more, or null for all")

    def heads(self, site: str) -> int:
        return self.n_kv_heads if site in KEY_VALUE_SITES else self.n_heads

    def row_blocks(self, site: str):
        """The numbers of the elements of one batch row and head that a fault can hit, a block of rows at a time."""
        width = {"lse": 1, "delta": 1}.get(site, self.tokens if site in CAUSAL_SITES else self.d_head)
        for first in range(0, self.tokens, 64):
            row = np.arange(first, min(first + 64, self.tokens))[:, None]
            column = np.arange(width)[None, :]
            number = row * width + column
            if site in CAUSAL_SITES:
                seen = (column <= row) & (column > row - (self.window or self.tokens))
                number = number[seen]
            yield number.ravel()


@lru_cache(maxsize=256)
def reach(share: float, site: str, shape: AttentionShape) -> float:
    """The largest place of an element that a fault hits: its share, or the smallest place there is if that is larger.

    Places as in ``models.bits``: the fractional part of (number + 1/2) golden ratios, FP64.
    """
    smallest = 1.0
    for number in shape.row_blocks(site):
        smallest = min(smallest, ((number + 0.5) * GOLDEN % 1).min().item())
        if smallest <= share:
            return share
    return smallest


def _check_heads(fault: SiteFault, count: int) -> None:
    if fault.heads is not None and max(fault.heads) >= count:
        raise ValueError(f"heads={list(fault.heads)} does not fit site {fault.site!r}: it has {count} heads")


@lru_cache(maxsize=256)
def kernel_faults(numerics: LayerNumerics, shape: AttentionShape, device: torch.device) -> KernelFaults:
    """Translate a layer's faults, once: no copy to the device at later steps, so that CUDA graphs can be captured.

    Raises ValueError where two faults with different operations meet on one site of one pass.
    """
    codes = {"forward": 0, "backward": 0}
    table = torch.zeros(2, len(SITES), 2, shape.n_heads, dtype=torch.float64)
    for (site, phase), faults in numerics.items():
        roundings = {fault.rounding for fault in faults}
        if len(roundings) > 1:
            raise ValueError(f"site {site!r}: one rounding a {phase} pass in the Triton kernel, got {sorted(roundings)}")
        index = SITES.index(site)
        codes[phase] |= _digit(roundings.pop(), any(fault.share < 1 for fault in faults), site)
        for fault in faults:
            _check_heads(fault, shape.heads(site))
            heads = slice(0, shape.heads(site)) if fault.heads is None else list(fault.heads)
            rows = table[0 if phase == "forward" else 1, index]
            rows[0, heads] = fault.bits
            rows[1, heads] = reach(fault.share, site, shape)
    return KernelFaults(codes["forward"], codes["backward"], table.to(device))
