"""The training objective as a smooth function of the weights, for those who ask how it bends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreshock.models.attention import DotProduct
from foreshock.models.transformer import Transformer


@contextmanager
def _unrounded(model: Transformer) -> Iterator[None]:
    """While it is open, the model stores nothing in BF16, and attention is the plain formula, twice differentiable."""
    precision, kernels = model.precision, [module for module in model.modules() if isinstance(module, DotProduct)]
    backends = [kernel.backend for kernel in kernels]
    model.precision = "fp32"
    for kernel in kernels:
        kernel.backend = "sdpa"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.precision = precision
        for kernel, backend in zip(kernels, backends, strict=True):
            kernel.backend = backend


def objective_at(model: Transformer, tokens_BT1: Tensor, balance_scale: float, weights: Mapping[str, Tensor]) -> Tensor:
    """What training minimises on this batch, NLL plus auxiliary losses in nats, at other weights, without rounding.

    A kernel that rounds to BF16 is a staircase in the weights, and a fault in it is none of the objective's: both are
    left out, so that derivatives exist and are exact to the weights' dtype. Its attention keeps (B, H, T, T) tensors.
    weights: by the model's parameter names, all of them; tied ones once. The model keeps its parameters, their ``grad``
    and its buffers. Returns a 0-dim tensor, of a stack one number a run, differentiable in ``weights`` without end.
    """
    tensors = dict(weights) | dict(model.named_buffers())
    with _unrounded(model):
        loss, auxiliary, _ = torch.func.functional_call(model, tensors, (tokens_BT1,), {"balance_scale": balance_scale})
    return loss + auxiliary
