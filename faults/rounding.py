"""Rounding to a narrower format, as an operation on whole tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foreshock.faults.operation import Moment

FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3": torch.float8_e4m3fn,
}
"""Number formats by name."""


def nearest(x: Tensor, form: str) -> Tensor:
    """x rounded to the nearest number of a format, ties to even, in the dtype of x.

    form: of ``FORMATS``, or ``fp32`` for x as it is. FP8 saturates at its largest number (as OCP's OFP8 allows), the
    16-bit formats overflow to Inf. NaN stays NaN.
    """
    if form == "fp32":
        return x
    dtype = FORMATS[form]
    if form.startswith("fp8"):
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
