"""How well a mean is known: what rounding alone leaves of the spread of equal numbers."""

from __future__ import annotations

import numpy as np


def mean_resolution(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """n eps max |x|: how far rounding may move the mean of n numbers, and so each residual from it, in FP64.

    (n - 1) additions err by at most (n - 1) u max |x| each n-th of the way (Higham 2002, section 4.2), the division and
    the subtraction by u each, u = eps / 2. Eleven times 0.3 have a mean of 0.30000000000000004: residuals up to this
    size are no spread. NaN and Inf count as 0.
    """
    sizes = np.where(np.isfinite(x), np.abs(x), 0.0)
    return x.shape[axis] * np.finfo(float).eps * sizes.max(axis, initial=0.0)
