"""What a norm computes, told from what it returns: LayerNorm or RMSNorm, and its epsilon."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALL = 1e-4
"""Size of a probe whose variance is small beside any epsilon in use, 1e-12 ... 1e-5."""


@dataclass(frozen=True)
class NormKind:
    """y = gain (x - mu) / sqrt(var + eps) + bias.

    centred: LayerNorm, whose mu is the mean of x and var the mean of (x - mu)^2; else RMSNorm, with mu = 0.
    """

    eps: float
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module) -> NormKind:
        """From the module itself where it is PyTorch's, else from two calls on numbers of our own, in FP32.

        Raises ValueError for a module that is no such norm.
        """
        known = getattr(module, "eps", None)
        if isinstance(module, nn.RMSNorm) and known is None:  # PyTorch takes the spacing at 1
            known = torch.finfo(torch.promote_types(module.weight.dtype, torch.float32)).eps
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and isinstance(known, float):
            return cls(known, isinstance(module, nn.LayerNorm))
        weight = module.weight
        assert isinstance(weight, Tensor)
        x = torch.sin(torch.arange(len(weight), dtype=torch.float64) * 1.7 + 0.3).to(weight.device)
        normed, shifted = (_called(module, each, weight) for each in (x, x + 10.0))
        centred = bool(torch.allclose(normed, shifted, atol=1e-3))
        tiny = SMALL * (x - x.mean() if centred else x)
        around = x - x.mean() if centred else x
        gain = _slope(module, weight, around)
        y = _called(module, tiny, weight) - _called(module, torch.zeros_like(tiny), weight)
        used = gain.abs() > 1e-6
        if not bool(used.any()):
            raise ValueError(f"{type(module).__name__} has a gain of 0 alone: its epsilon cannot be told")
        ratio = (gain[used] * tiny[used] / y[used]).square().median()
        eps = float(ratio - tiny.square().mean())
        if not 0 <= eps < 1:
            raise ValueError(f"{type(module).__name__} is no LayerNorm and no RMSNorm")
        named = [
            value
            for name in ("variance_epsilon", "epsilon", "eps")
            if isinstance(value := vars(module).get(name), float)
        ]
        near = [value for value in (*named, 1e-5, 1e-6, 1e-8, 1e-12) if abs(value - eps) < 0.02 * value]
        return cls(near[0] if near else eps, centred)


def _called(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return module(x[None].to(weight.dtype))[0].double()


def _slope(module: nn.Module, weight: Tensor, around: Tensor) -> Tensor:
    """The gain, from a call on large numbers, beside which any epsilon is nothing; a bias is taken off."""
    large = 1e3 * around
    bias = _called(module, torch.zeros_like(large), weight)
    return (_called(module, large, weight) - bias) * large.square().mean().sqrt() / large
