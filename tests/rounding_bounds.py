"""How far two right computations of one number may lie apart, from operation counts and the format.

A number made of n roundings in a format of unit roundoff u has a relative error of at most

    gamma_n = n u / (1 - n u)                                   (Higham, Accuracy and Stability, 2002, section 3.1)

of the sum of its terms' magnitudes, in any order of sums; of roundings taken as independent, at most lambda sqrt(n) u
but for 2 n exp(-lambda^2 / 2) of the cases (Higham & Mary, SIAM J. Sci. Comput. 41, 2019). Two orders lie apart by
twice that.
"""

from __future__ import annotations

import math

from scipy.stats import chi2

FP64 = 2.0**-53
FP32 = 2.0**-24
BF16 = 2.0**-8
"""Unit roundoffs: half the distance of 1 to the next number."""


def gamma(roundings: int, unit: float) -> float:
    """The bound that no order of sums exceeds, relative to the sum of the terms' magnitudes."""
    error = roundings * unit
    if error >= 1:
        raise ValueError(f"{roundings} roundings of unit {unit} leave no digit")
    return error / (1 - error)


def likely(roundings: int, unit: float, sigmas: float = 6.0) -> float:
    """The bound of independent roundings: 6 sigmas leave out 3e-8 of the cases times the number of roundings."""
    return sigmas * math.sqrt(roundings) * unit


def once_stored_in_bf16(roundings: int) -> float:
    """Of two FP32 computations whose numbers were rounded to BF16 once on the way, relative, in a tensor's norm.

    Two results lie up to 2 gamma_n apart, and BF16 numbers u to 2 u, u = ``BF16``: a share of up to 2 gamma_n / u of
    the numbers rounds to another one, and moves by up to 2 u. A fault of one bit moves half of them by as much.
    """
    return 2 * BF16 * math.sqrt(2 * gamma(roundings, FP32) / BF16)


def rms_range(numbers: int, tail: float = 1e-6) -> tuple[float, float]:
    """Between which the root mean square of independent standard normal numbers lies, but for ``tail`` on either side.

    By chi-square with as many degrees of freedom: 0.65 to 1.39 for 80, 0.52 to 1.56 for 40, 0.22 to 2.2 for 10.
    """
    return math.sqrt(chi2.ppf(tail, numbers) / numbers), math.sqrt(chi2.isf(tail, numbers) / numbers)
