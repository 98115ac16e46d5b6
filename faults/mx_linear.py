"""Matrix products in block formats: MXFP8, MXFP6, MXFP4 and NVFP4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.emulated_product import quantised_by_axis
from foreshock.faults.product_format import Linear, ProductFormat, Scope, check_modules
from foreshock.faults.quantised import BLOCK_FORMATS, in_blocks
from foreshock.faults.rounding import check_format

FORMATS = (*BLOCK_FORMATS, "fp32")
MOST_IN_BLOCK = 65_536


@dataclass(frozen=True)
class BlockProducts(ProductFormat):
    """Linear layers with operands in blocks along what is summed over.

    block: elements, or None for the format's own.
    """

    block: int | None

    def forward_of(self, name: str, module: Linear, scope: Scope) -> Callable[..., Tensor]:
        def quantise(operand: str, summed: str, x: Tensor, axis: int) -> Tensor:
            form = self.form_of(operand)
            if form == "fp32":
                return x
            rounded = in_blocks(x, form, self.block, axis)
            if scope.log is not None:
                scope.log.add("formats", self, f"{name} {operand} along {summed}", x, rounded)
            return rounded

        return quantised_by_axis(module, quantise)


@dataclass(frozen=True, kw_only=True)
class MXLinear(OperationFault):
    """Linear layers multiply numbers in blocks with a scale each, at the steps of a window.

    What breaks: training in a block format that is too coarse, or whose shared scale clips; Report: arXiv:2506.20752.
    Formats: OCP Microscaling v1.0 with blocks of 32 and scales of powers of 2 (E8M0); NVFP4 with blocks of 16, an E4M3
    scale a block and an FP32 one a tensor (``faults.quantised``).
    Equation: y = Q(x) Q(W)^T, dx = Q(dy) Q(W), dW = Q(dy)^T Q(x), blocks along what each product sums over: inputs,
    outputs, tokens. With the scale of MX v1.0, 2^(floor(log2 amax) - emax), a block's largest number may saturate: in
    E4M3 what is above 1.75 of its power of 2 (448 of 512).

    Emulated (``faults.emulated_product``): operands are FP32 numbers of the format, sums are FP32. As x, W and dy have
    another value in each product, no law of a linear layer holds, and its monitors leave these layers out by name. Each
    expert's slots have blocks of their own. Not modelled: a tensor core's accumulator, stochastic rounding of gradients
    and random Hadamard transforms, which recipes of NVFP4 add, and attention's own products.

    modules: names or patterns of linear layers, None for those of the blocks but routers; format: of x and W, of
    ``FORMATS``, ``fp32`` the healthy control; gradient_format: of dy, None for the same; block: elements, None for the
    format's own. Raises ValueError on impossible values, by name, and before training for a name of no linear layer and
    with ``train.compile``.
    """

    modules: tuple[str, ...] | None = None
    format: str = "mxfp8_e4m3"
    gradient_format: str | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        check_modules(self.modules)
        check_format(self.format, FORMATS)
        if self.gradient_format is not None and self.gradient_format not in FORMATS:
            raise ValueError(
                f"fault.gradient_format={self.gradient_format!r} is not allowed: one of {', '.join(FORMATS)}, or null "
                "for the same as format"
            )
        if self.block is not None and not 1 <= self.block <= MOST_IN_BLOCK:
            raise ValueError(
                f"fault.block={self.block} is not allowed: 1 to {MOST_IN_BLOCK} elements, or null for the format's own"
            )
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        products = BlockProducts(self.modules, self.format, self.gradient_format or self.format, self.block)
        return Corrupt("formats", (products,), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "formats", "modules": self.modules}
        size = {"format": self.format, "gradient_format": self.gradient_format or self.format, "block": self.block}
        return InjectionCard(self.family, (self.injection("quantise", where, size, control=self.format == "fp32"),))
