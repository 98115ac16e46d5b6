"""Spectral norms of the query and key weights, head by head."""

from __future__ import annotations

import torch

from foreshock.monitors.attention_update import PER_HEAD, attention_weights, head_blocks, stack_matrix
from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.spectra import singular_values


class SpectralNorm:
    """``spectral_radius.q`` and ``.k``: the largest singular value of each query head's W_Q, key head's W_K. Bad: up.

    Low-precision attention fails by rank-1 weight errors that add up until this norm explodes (Qiu & Yao,
    arXiv:2510.04212). FP64, (layers, heads of the matrix), from 0; NaN or Inf in a weight gives NaN.
    """

    needs = Needs(stackable=True)

    def __init__(self, every_steps: int) -> None:
        self.signals = tuple(
            Signal(f"spectral_radius.{m}", "1", "up", PER_HEAD, every_steps, family="weight_structure") for m in "qk"
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        now, config = attention_weights(view.model), view.model.config
        both = torch.cat([head_blocks(stack_matrix(now, config.n_layers, m), config) for m in "qk"], dim=1)
        largest = singular_values(both)[..., 0].split((config.n_heads, config.kv_heads), dim=1)
        return {f"spectral_radius.{m}": norm for m, norm in zip("qk", largest, strict=True)}
