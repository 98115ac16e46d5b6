"""Rounding to a narrower format, as an operation on whole tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foreshock.faults.operation import Moment

FORMATS: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp32": torch.float32,
}
"""Number formats by name; ``fp32`` changes nothing."""


def check_format(number_format: str, known: Collection[str] = tuple(FORMATS)) -> None:
    """Raise ValueError for a format that is not one of ``known``."""
    if number_format not in known:
        raise ValueError(f"fault.format={number_format!r} is not allowed: one of {', '.join(known)}")


@dataclass(frozen=True)
class Grid:
    """The finite numbers of a format of 8 bits or fewer.

    mantissa_bits: stored ones; smallest_exponent, largest_exponent: of a normal number, powers of 2; largest: number.
    """

    mantissa_bits: int
    smallest_exponent: int
    largest_exponent: int
    largest: float

    def spacing(self, x: Tensor) -> Tensor:
        """The distance between the two numbers of the grid around each element of x, a power of 2 in FP32."""
        exponent = (torch.frexp(x).exponent - 1).clamp(self.smallest_exponent, self.largest_exponent)
        return power_of_2(exponent - self.mantissa_bits)


GRIDS = {
    "fp8_e4m3": Grid(3, -6, 8, 448.0),
    "fp8_e5m2": Grid(2, -14, 15, 57344.0),
    "fp6_e2m3": Grid(3, 0, 2, 7.5),
    "fp6_e3m2": Grid(2, -2, 4, 28.0),
    "fp4_e2m1": Grid(1, 0, 2, 6.0),
}
"""Elements of OCP's OFP8 and Microscaling formats v1.0, by name."""


def power_of_2(exponent: Tensor) -> Tensor:
    """2^exponent in FP32, exactly. exponent: integer, -127 (a subnormal number) to 127."""
    exponent = exponent.to(torch.int32)
    return torch.where(exponent > -127, exponent + 127 << 23, 1 << 22).to(torch.int32).view(torch.float32)


def nearest(x: Tensor, number_format: str) -> Tensor:
    """x rounded to the nearest number of a format, ties to even, in the dtype of x.

    number_format: of ``FORMATS`` or ``GRIDS``; ``fp32`` gives x as it is. Those of ``GRIDS`` saturate at their largest
    number, without a scale (as OCP's OFP8 allows), the 16-bit formats overflow to Inf. NaN stays NaN.
    """
    if number_format == "fp32":
        return x
    if number_format in GRIDS:
        largest = GRIDS[number_format].largest
        x = x.clamp(-largest, largest)
    if number_format in FORMATS:
        return x.to(FORMATS[number_format]).to(x.dtype)
    spacing = GRIDS[number_format].spacing(x)
    return (x / spacing).round() * spacing


STOCHASTIC = ("bf16", "fp8_e4m3", "fp8_e5m2", "fp32")
"""The formats of ``stochastic``."""


def stochastic(x: Tensor, number_format: str, moment: Moment) -> Tensor:
    """FP32 x rounded to one of its two neighbours in a format, each the likelier the nearer it is, so that the mean
    is x.

    number_format: of ``STOCHASTIC``; ``fp32`` gives x as it is. FP8 saturates at its largest number, without a scale,
    so that the mean of what lies beyond is not x. The draw is a pure function of seed, step and tensor.
    """
    if number_format == "fp32":
        return x
    return stochastic_bf16(x, moment) if number_format == "bf16" else _stochastic_on(GRIDS[number_format], x, moment)


def _draws(moment: Moment) -> np.random.Generator:
    return moment.generator(f"stochastic_rounding {moment.tensor}")


def _stochastic_on(grid: Grid, x: Tensor, moment: Moment) -> Tensor:
    """Up with the probability of the share of the spacing that x is above its lower neighbour, a multiple of 2^-53.

    Inf is the largest number, NaN stays.
    """
    x = x.clamp(-grid.largest, grid.largest)
    spacing = grid.spacing(x)
    lower = (x / spacing).floor()  # the quotient is exact, and so is what it is above its floor in FP64
    share = (x / spacing).double() - lower.double()
    draw = torch.from_numpy(_draws(moment).random(size=tuple(x.shape))).to(x.device)
    return (lower + (draw < share)) * spacing


def stochastic_bf16(x: Tensor, moment: Moment) -> Tensor:
    """FP32 x rounded to one of its two BF16 neighbours, each the likelier the nearer it is, so that the mean is x.

    A uniform 16-bit integer is added to the raw number, whose low 16 bits are then cleared (arXiv:2010.06192). The draw
    is a pure function of seed, step and tensor. Inf and NaN stay.
    """
    draws = _draws(moment).integers(0, 1 << 16, size=x.numel(), dtype=np.int32)
    raw = x.contiguous().view(torch.int32) + torch.from_numpy(draws).view(x.shape).to(x.device)
    return torch.where(x.isfinite(), (raw & -(1 << 16)).view(torch.float32), x)
