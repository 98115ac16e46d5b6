"""Rounding to a narrower format, as an operation on whole tensors."""

from __future__ import annotations

from collections.abc import Collection

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


def nearest(x: Tensor, number_format: str) -> Tensor:
    """x rounded to the nearest number of a format, ties to even, in the dtype of x.

    number_format: of ``FORMATS``; ``fp32`` gives x as it is. FP8 saturates at its largest number, without a scale (as
    OCP's OFP8 allows), the 16-bit formats overflow to Inf. NaN stays NaN.
    """
    if number_format == "fp32":
        return x
    dtype = FORMATS[number_format]
    if number_format.startswith("fp8"):
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype).to(x.dtype)


def stochastic_bf16(x: Tensor, moment: Moment) -> Tensor:
    """FP32 x rounded to one of its two BF16 neighbours, each the likelier the nearer it is, so that the mean is x.

    A uniform 16-bit integer is added to the raw number, whose low 16 bits are then cleared (arXiv:2010.06192). The draw
    is a pure function of seed, step and tensor. Inf and NaN stay.
    """
    generator = moment.generator(f"stochastic_rounding {moment.tensor}")
    draws = generator.integers(0, 1 << 16, size=x.numel(), dtype=np.int32)
    raw = x.contiguous().view(torch.int32) + torch.from_numpy(draws).view(x.shape).to(x.device)
    return torch.where(x.isfinite(), (raw & -(1 << 16)).view(torch.float32), x)
