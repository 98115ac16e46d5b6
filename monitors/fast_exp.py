"""The exponential of PyTorch's flash kernel for BF16 on x86 CPUs, bit by bit.

exp(x) = 2^y, y = x log2 e. The bits of an FP32 number, read as an integer, are its base-2 logarithm but for a function
of the significand. A polynomial K of degree 3 in the fraction f of y stands for that function (Malossi, Ineichen, Bekas
& Curioni, Fast exponential computation on SIMD architectures, 2015), so that

    exp(x) = the FP32 number whose bits are the integer 2^23 (y - K(f) + 127), cut off

is right to 1.1e-4 + |x| 2^-23 (the polynomial, and y in FP32), above and below by turns. That is less than a thirtieth
of the distance of two BF16 numbers, so most of Pbar rounds as it would anyway; but equal scores err alike, and the
log-sum-exp, to which P is relative, takes the error unrounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POLYNOMIAL = (-0.079204240219773236, -0.22433836478672356, 0.30354260500649682, 0.00010703434948458272)
"""Coefficients of K, that of f^3 first (PyTorch 2.13, aten/cpu/vec, ``fexp_u20``)."""
LOWEST = -87.0
"""Below, the kernel comes to 0: exp(x) has no normal FP32 number from -87.34 on."""


def fast_exp(x: Tensor) -> Tensor:
    """exp(x) as the kernel has it, for x <= 0, elementwise, FP32. 0 below ``LOWEST``.

    NaN and positive x are undefined.
    """
    y = x.float().clamp_min(LOWEST) * torch.tensor(math.log2(math.e), dtype=torch.float32)
    fraction = y - y.floor()
    k = torch.full_like(fraction, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        k = _fused(k, fraction, torch.tensor(coefficient, dtype=torch.float32))
    bits = _fused(y - k, torch.tensor(2.0**23), torch.tensor(127 * 2.0**23))
    return torch.where(x < LOWEST, 0.0, bits.int().view(torch.float32))


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c, rounded to FP32 once, but for one in 2^29 that FP64 has rounded already."""
    return (a.double() * b.double() + c.double()).float()
