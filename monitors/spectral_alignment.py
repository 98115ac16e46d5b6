"""Spectral alignment: whether all tokens meet a layer's strongest direction with the same sign."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock.models.numerics import at_least_fp32
from foreshock.models.taps import known
from foreshock.monitors.base import Masked, Needs, Reading, Signal, StepView
from foreshock.monitors.eigen import eigenvectors

LAYERS = {**{part: part for part in "qkvo"}, "mlp_input": "input", "mlp_output": "output"}
"""By suffix, the role of a block's linear layer that every token meets; experts have none such in their MLP."""


def top_right_singular_vector(weight: Tensor) -> Tensor:
    """v_1 of W, up to its sign: (..., m, n) -> (..., n), of length 1, W's dtype. NaN for a zero W, or NaN or Inf in it.

    The top eigenvector of the smaller Gram matrix, which is exact at any gap and, at these widths, no dearer than the
    power iterations that a small gap asks for. Of a wide W that is u_1, and W^T u_1 points along v_1.
    """
    largest = weight.abs().amax((-2, -1), keepdim=True)
    weight = weight / torch.where(largest > 0, largest, 1.0)  # so that no square leaves the format
    wide = weight.shape[-2] < weight.shape[-1]
    gram = weight @ weight.mT if wide else weight.mT @ weight
    broken = ~torch.isfinite(gram).all(-1).all(-1)
    top = eigenvectors(torch.where(broken[..., None, None], 0.0, gram))[1][..., -1]
    along = (weight.mT @ top[..., None]).squeeze(-1) if wide else top * (gram != 0).any(-1).any(-1)[..., None]
    along = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True)
    return torch.where(broken[..., None], torch.nan, along)


def majority_fraction(projection: Tensor) -> Tensor:
    """Share of the tokens with the more frequent sign, (..., tokens) -> (...), in [0.5, 1]; a zero counts half.

    NaN or Inf among them gives NaN.
    """
    fraction = (1 + projection.sign().mean(-1).abs()) / 2
    return torch.where(projection.isfinite().all(-1), fraction, torch.nan)  # a NaN has no sign: it would count half


class SpectralAlignment:
    """``spectral_alignment``: share of tokens with the majority sign of cos(x, v_1), per layer, in [0.5, 1]. Bad: up.

    x: the layer's inputs, one a token; v_1: the top right singular vector of the weight that they met. When the signs
    lose their diversity, every token pushes the weight's strongest direction the same way and its spectral norm grows
    (Qiu et al., arXiv:2510.04202). Suffixes as in ``LAYERS``; a model with experts has no ``mlp_*``. A zero weight has
    no direction: masked. NaN or Inf in weight or inputs gives NaN.
    """

    needs = Needs(taps=("linear",), stackable=True)

    def __init__(self, every_steps: int) -> None:
        self.signals = tuple(
            Signal(f"spectral_alignment.{layer}", "1", "up", ("layer",), every_steps, family="model_behavior")
            for layer in LAYERS
        )

    @torch.no_grad()
    def observe(self, view: StepView) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        for suffix, role in LAYERS.items():
            taps = view.tapped("linear", role)
            if not taps:
                continue  # experts have a weight each, and no MLP beside them
            weight = torch.stack([known(tap.weight, "a tapped weight") for tap in taps])
            inputs = at_least_fp32(torch.stack([tap.inputs[0].flatten(0, -2) for tap in taps]))
            projection = (inputs @ top_right_singular_vector(weight)[..., None]).squeeze(-1)
            undefined = (weight == 0).all(-1).all(-1) & inputs.isfinite().all(-1).all(-1)
            readings[f"spectral_alignment.{suffix}"] = Masked(majority_fraction(projection), undefined)
        return readings
