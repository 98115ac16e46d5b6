"""How far two readings of the same tensors of a tiny run may lie apart, where only the order of sums differs."""

from __future__ import annotations

from tests.rounding_bounds import BF16, FP32, gamma

ROUNDINGS = 2 * gamma(1500, FP32)
"""Of two orders, to a signal's size. The longest way goes through a Hessian product, which is thrice a gradient's: 128
tokens' sum, 41 logits, two layers with products of 16, 16, 16 and 32 terms and their norms, 500 in all.
"""
REMAINDERS = 2 * gamma(64, FP32) / (BF16 / 2)
"""The same of what is left of a product of 16 + 16 + 32 terms when the kernel's own, rounded to BF16, is taken off."""
OF_REMAINDERS = ("attention_recomputed", "delta_bias_oracle", "qk_gauge_residual", "vo_gauge_residual")


def error_bound(signal: str) -> float:
    """Relative to the largest magnitude that a signal has in any run, layer or head."""
    return REMAINDERS if signal.startswith(OF_REMAINDERS) else ROUNDINGS
