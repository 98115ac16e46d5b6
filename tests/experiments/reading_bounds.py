"""How far two readings of the same tensors of a tiny run may lie apart, where only the order of sums differs."""

from __future__ import annotations

import math

from tests.rounding_bounds import BF16, FP32, gamma

ROUNDINGS = 2 * gamma(1500, FP32)
"""Of two orders, to a signal's size. The longest way goes through a Hessian product, which is thrice a gradient's: 128
tokens' sum, 41 logits, two layers with products of 16, 16, 16 and 32 terms and their norms, 500 in all.
"""
REMAINDERS = 2 * gamma(64, FP32) / (BF16 / 2)
"""The same of what is left of a product of 16 + 16 + 32 terms when the kernel's own, rounded to BF16, is taken off."""
TIPPED = math.sqrt(12 / 200)
"""Of a ratio to the rounding that a twin computes again, a quarter. Two orders round an FP32 number near the middle of
two BF16 ones to either. A number that holds 1/200 of the prediction errs by the root of 1/200 of it as a root mean
square, and rounding it to the other side moves the sum by sqrt(12) times that. A head here has 16 x 16 P and dS and
16 x 8 of each stored tensor.
"""
OF_REMAINDERS = ("attention_recomputed", "delta_bias_oracle", "qk_gauge_residual", "vo_gauge_residual")
OF_ATTENTION = (*OF_REMAINDERS, "key_shift_residual", "value_shift_residual")


def error_bound(signal: str) -> float:
    """Relative to the largest magnitude that a signal has in any run, layer or head."""
    if signal.endswith(".over_noise") and signal.startswith(OF_ATTENTION):
        return TIPPED
    return REMAINDERS if signal.startswith(OF_REMAINDERS) else ROUNDINGS
