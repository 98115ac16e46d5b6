"""Tensors in a narrow format under a scale, given back as the FP32 numbers that they stand for.

One scale a tensor, as FP8 recipes have it, or one a block of neighbours: the Microscaling formats of OCP (MX v1.0) and
NVFP4. Elements are rounded to nearest, ties to even, and saturate.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from foreshock.faults.rounding import GRIDS, nearest, power_of_2

FP32_LARGEST = torch.finfo(torch.float32).max
NVFP4_SCALE = "fp8_e4m3"
"""Format of the scale of an NVFP4 block."""


def scale_of(amax: Tensor, number_format: str, factor: float = 1.0) -> Tensor:
    """factor x largest / amax, with which a tensor is multiplied before it is rounded to FP8, 0-dim.

    It is ``factor`` where amax is 0, Inf or NaN, as in a tensor of which nothing is known, and FP32's largest number
    where it would be more than that.
    """
    known = (amax > 0) & amax.isfinite()
    scale = torch.where(known, GRIDS[number_format].largest / amax, 1.0)
    return (scale.clamp(max=FP32_LARGEST) * factor).clamp(max=FP32_LARGEST)


def in_tensor(x: Tensor, number_format: str, scale: Tensor) -> Tensor:
    """round(x scale) / scale. number_format: of FP8; NaN stays NaN, Inf saturates."""
    return nearest(x * scale, number_format) * (1 / scale)


@dataclass(frozen=True)
class BlockFormat:
    """Elements with a scale a block. element: of ``faults.rounding.GRIDS``; block: elements of an ordinary block.

    shared_scale: ``e8m0``, 2^k with k = floor(log2 amax) - emax of the element's format, clamped to -127 ... 127 (MX
    v1.0, section 6.3), or ``nvfp4``: s fp8(amax / (6 s)), ties to even, of the E4M3 grid, with s = tensor's amax /
    (448 x 6) in FP32.
    """

    element: str
    block: int = 32
    shared_scale: str = "e8m0"


BLOCK_FORMATS = MappingProxyType(
    {
        "mxfp8_e4m3": BlockFormat("fp8_e4m3"),
        "mxfp8_e5m2": BlockFormat("fp8_e5m2"),
        "mxfp6_e2m3": BlockFormat("fp6_e2m3"),
        "mxfp6_e3m2": BlockFormat("fp6_e3m2"),
        "mxfp4_e2m1": BlockFormat("fp4_e2m1"),
        "nvfp4": BlockFormat("fp4_e2m1", 16, "nvfp4"),
    }
)
"""By the names of their fault's keys."""


def in_blocks(x: Tensor, number_format: str, block: int | None = None, axis: int = -1) -> Tensor:
    """x in blocks along an axis, as the FP32 numbers that they stand for.

    number_format: of ``BLOCK_FORMATS``; block: elements that share a scale, None for the format's own; the last block
    has what is left. A block of zeros is zeros. A block with an Inf or a NaN is NaN whole, as OCP allows; of NVFP4 the
    tensor is.
    """
    if not x.numel():
        return x
    form = BLOCK_FORMATS[number_format]
    rows = x.float().movedim(axis, -1)
    length, block = rows.shape[-1], block or form.block
    blocks = F.pad(rows, (0, -length % block)).unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = _mx_scale(amax, form) if form.shared_scale == "e8m0" else _nvfp4_scale(amax, form)
    rounded = torch.where(scale > 0, nearest(blocks / scale, form.element), 0.0) * scale
    return rounded.flatten(-2)[..., :length].movedim(-1, axis).to(x.dtype)


def _mx_scale(amax: Tensor, form: BlockFormat) -> Tensor:
    """2^k of each block; 2^-127 for zeros, NaN where amax is none."""
    exponent = torch.frexp(amax).exponent - 1 - GRIDS[form.element].largest_exponent
    scale = power_of_2(torch.where(amax > 0, exponent, -127).clamp(-127, 127))
    return torch.where(amax.isfinite(), scale, torch.nan)


def _nvfp4_scale(amax: Tensor, form: BlockFormat) -> Tensor:
    """The scale of each block times that of the tensor; 0 for zeros and for what E4M3 rounds to 0."""
    largest = GRIDS[form.element].largest
    of_tensor = amax.amax() / (GRIDS[NVFP4_SCALE].largest * largest)
    relative = torch.where(of_tensor > 0, amax / largest / of_tensor, 0.0)
    scale = nearest(relative, NVFP4_SCALE) * of_tensor
    return torch.where(of_tensor.isfinite(), scale, torch.nan)
