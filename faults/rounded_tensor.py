"""Tensors of modules rounded to a lower format, with no bits cleared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from foreshock.faults.rounding import check_format, nearest
from foreshock.models.corruption import MODULE_SITES, TensorChange, has_weight
from foreshock.models.mlp import MLP
from foreshock.models.moe import GroupedLinear, MoE
from foreshock.models.numerics import at_least_fp32
from foreshock.models.transformer import Block, Rotary, TransformerConfig, skeleton

STATISTICS = "statistics"
"""Of a norm: the mean, if it has one, and the reciprocal of the standard deviation or root mean square."""

WITHOUT_WEIGHT = (Block, MLP, MoE, Rotary)

_OF_PRODUCTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: MODULE_SITES,
    GroupedLinear: MODULE_SITES,
    MLP: ("y", "dy"),
    Rotary: ("dy", "dx"),
}
"""Tensors that a matrix product alone gives or takes, and that hold BF16 numbers under its autocast
(``models.precision``). A router's product is none of these: it stays FP32."""


@dataclass(frozen=True)
class RoundedTensor(TensorChange):
    """One tensor of one module, rounded whole.

    module: a name such as ``tokens``, ``head``, ``blocks.0.mlp.router``, ``blocks.0.attention.rotary``, or ``blocks.0``
    for the residual stream after that block; site: one of ``SITES``; format: of ``faults.rounding.FORMATS``. A rounded
    value takes the gradient of the exact one. Raises ValueError on impossible values, by name.
    """

    SITES: ClassVar[tuple[str, ...]] = (*MODULE_SITES, STATISTICS)

    format: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.format)

    @property
    def idle(self) -> bool:
        return self.format == "fp32"

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        super().check_fits(model, train)
        of_products = _OF_PRODUCTS.get(type(self.find(skeleton(model))), ())
        is_router = self.module.rpartition(".")[2] == "router"
        if train.precision == self.format == "bf16" and self.site in of_products and not is_router:
            raise ValueError(
                f"fault.format='bf16' has no effect on {self.site!r} of {self.module}: it is BF16 already with "
                "train.precision=bf16; choose fp8_e4m3 or fp8_e5m2"
            )

    @property
    def target(self) -> tuple[str, str]:
        return self.module, "y" if self.site == STATISTICS else self.site  # statistics are rounded in the output

    @staticmethod
    def has_place(name: str, module: nn.Module) -> bool:
        # the positions' embedding is read without a call, so that no hook sees it
        embedding = isinstance(module, nn.Embedding) and name != "positions"
        return has_weight(module) or embedding or isinstance(module, WITHOUT_WEIGHT)

    def find(self, model: nn.Module) -> nn.Module:
        module = super().find(model)
        lacks = {
            STATISTICS: not isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and "it is no norm",
            "dw": isinstance(module, WITHOUT_WEIGHT) and "it has no weight of its own",
            "dx": isinstance(module, nn.Embedding) and "its input is token ids",
        }.get(self.site)
        if lacks:
            raise ValueError(f"fault.site={self.site!r} is not allowed for {self.module!r}: {lacks}")
        return module

    def corrupt(self, x: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
        if self.site == STATISTICS:
            return self._normalised(module, arguments[0].detach()).to(x.dtype)
        return nearest(x.detach(), self.format)

    def _normalised(self, norm: Any, x: Tensor) -> Tensor:
        """The output of a norm whose statistics are rounded, in FP32."""
        x, centre = at_least_fp32(x), torch.zeros(())
        if isinstance(norm, nn.LayerNorm):
            variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
            centre = nearest(mean, self.format)
        else:
            variance = x.square().mean(-1, keepdim=True)
        epsilon = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        y = (x - centre.to(x.device)) * nearest((variance + epsilon).rsqrt(), self.format) * norm.weight.detach()
        return y if getattr(norm, "bias", None) is None else y + norm.bias.detach()
