"""Where the prediction of rounding is known to hold, so that the rule ``universal`` has a rate."""

from __future__ import annotations

import torch

from foreshock.models.anatomies.attention_call import REFERENCE, TORCH_FLASH
from foreshock.models.taps import Taps

PROVEN = ((REFERENCE, None), (REFERENCE, torch.bfloat16), (TORCH_FLASH, torch.bfloat16))
"""Kernel and arithmetic of calls whose ratios stay below the threshold in healthy runs (``results/healthy_zoo``). In
others, such as FP32, healthy ratios stand above 1, and the threshold is a scale without a promise."""


def is_proven(taps: Taps) -> bool:
    """Whether every attention that is tapped runs in such an arithmetic."""
    tapped = taps.at("dot_product").values() if "dot_product" in taps.places else ()
    return all((tap.call.kernel, tap.call.dtype) in PROVEN for tap in tapped if tap.call is not None)
