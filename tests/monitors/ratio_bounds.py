"""Between which the root mean square of a law's residual over its predicted rounding lies on any machine."""

from __future__ import annotations

from tests.rounding_bounds import rms_range

MODEL = 1.1
"""What taking u^2 x^2 for the mean square of a rounding is off by: 12 % where significands are not log-uniform."""
IN_FP32 = ("linear_euler_residual.router", "router_shift_residual", "norm_orthogonality_residual")
"""Laws of what is computed in FP32 under autocast, too."""
ORDER = 2.0
"""Of those in FP32, what another library's order of sums may make of a ratio: the sum over 256 tokens, predicted in
blocks of 128, errs sqrt(85.8 / 22.2) = 1.97 times as far in one piece (``fp32_rounding.accumulation``), a row sum of a
norm 1.7 times as far without lanes, and both less in smaller blocks.
"""


def legal(law: str, numbers: int, in_fp32: bool = False) -> tuple[float, float]:
    """The range of a ratio's root mean square, by its number of independent numbers.

    A law in W is one number a layer and batch; one of each token or row is taken as ``numbers`` too, though it has
    some 256 times as many. in_fp32: of a product that accumulates and returns FP32.
    """
    low, high = rms_range(numbers)
    other = MODEL * (ORDER if in_fp32 or law.startswith(IN_FP32) else 1)
    return low / other, high * other
