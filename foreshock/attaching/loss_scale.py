"""By what factor the gradients of a step are those of the mean cross-entropy over the tokens that were tapped.

A loss is divided by the number of micro-batches, multiplied by a GradScaler's scale, or averaged over fewer tokens than
the model saw, where the last of a sequence has no target. Laws do not mind; a prediction of rounding that is written
for the mean over N tokens is multiplied by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foreshock.models.anatomy import Anatomy
from foreshock.models.numerics import at_least_fp32
from foreshock.models.taps import Taps

SAMPLED = 512
"""Tokens that the factor is told from."""
MOST_PARTS = 128
"""Largest number of micro-batches that a loss is taken to be divided by."""


@torch.no_grad()
def loss_scale(anatomy: Anatomy, taps: Taps) -> float | None:
    """The factor, from the head's tap; None where it is 1, or there is no head.

    The gradient at a target's logit is c (p - 1): c is read from the tokens whose gradient is not 0, and c times their
    number is 2^m / k for a loss that was scaled by 2^m and divided by k. Where it is near no such number, it is c N.
    """
    found = anatomy.taps("head", taps.at("linear"))
    if not found or found[0].output is None or found[0].output_grad is None:
        return None
    logits, gradients = (x.flatten(0, -2) for x in (found[0].output, found[0].output_grad))
    counted = gradients.abs().amax(-1) > 0
    chosen = counted.nonzero()[:, 0]
    if not len(chosen):
        return None
    sample = chosen[:: max(1, len(chosen) // SAMPLED)]
    least, target = at_least_fp32(gradients[sample]).min(-1, keepdim=True)
    p: Tensor = at_least_fp32(logits[sample]).log_softmax(-1).gather(-1, target).double().exp()
    per_token = float((least.double() / (p - 1)).median())
    if not math.isfinite(per_token) or per_token <= 0:
        return None
    scale = simple(per_token * len(chosen)) / len(chosen) * len(counted)
    return None if scale == 1.0 else scale


def simple(factor: float) -> float:
    """The nearest 2^m / k, k up to ``MOST_PARTS``, where one is within 2^-8 of it; else the factor itself."""
    candidates = [(k, 2.0 ** round(math.log2(factor * k)) / k) for k in range(1, MOST_PARTS + 1)]
    near = [value for _, value in candidates if abs(value / factor - 1) < 2.0**-8]
    return near[0] if near else factor
