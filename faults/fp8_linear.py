"""FP8 matrix products with a scale a tensor: the recipe, and its format as an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.emulated_product import one_quantised
from foreshock.faults.product_format import Linear, ProductFormat, Scope, check_modules
from foreshock.faults.quantised import in_tensor, scale_of
from foreshock.faults.rounding import check_format

FP8 = ("fp8_e4m3", "fp8_e5m2", "fp32")
SCALINGS = ("current", "delayed")
MOST_UPDATES = 10_000


@dataclass(frozen=True)
class FP8Products(ProductFormat):
    """Linear layers with FP8 operands, each a tensor with one scale.

    scaling: ``current``, by this tensor's own amax, or ``delayed``, by the largest of the last ``history`` updates, 1
    while none is known. lag: updates by which the amaxes are older than that; until so many are known the oldest, and
    before any is, as with lag 0. factor: on the scale.
    """

    scaling: str
    history: int
    lag: int = 0
    factor: float = 1.0

    def forward_of(self, name: str, module: Linear, scope: Scope) -> Callable[..., Tensor]:
        def quantise(operand: str, x: Tensor) -> Tensor:
            form, tensor = self.form_of(operand), f"{name} {operand}"
            if form == "fp32":
                return x
            rounded = in_tensor(x, form, self._scale(tensor, x, form, scope))
            if scope.log is not None:
                scope.log.add("formats", self, tensor, x, rounded)
            return rounded

        return one_quantised(module, quantise)

    def _scale(self, name: str, x: Tensor, form: str, scope: Scope) -> Tensor:
        amax = x.abs().amax() if x.numel() else x.new_zeros(())
        if self.scaling == "current" and not self.lag:
            return scale_of(amax, form, self.factor)
        # one update is looked back to for a stale current scale, and its lag ends at the one before this
        updates, lag = (self.history, self.lag) if self.scaling == "delayed" else (1, self.lag - 1)
        known = scope.amaxes.largest(name, updates, lag)
        if torch.is_grad_enabled() or name.endswith(" dy"):
            scope.amaxes.note(name, amax, updates + lag)
        if known is None:
            known = torch.zeros_like(amax) if self.scaling == "delayed" else amax
        return scale_of(known, form, self.factor)


@dataclass(frozen=True, kw_only=True)
class FP8Fault(OperationFault):
    """The keys of an FP8 recipe, for ``FP8Linear`` and the faults of its scale.

    Raises ValueError on impossible values, by name.
    """

    modules: tuple[str, ...] | None = None
    format: str = "fp8_e4m3"
    gradient_format: str = "fp8_e5m2"
    scaling: str = "current"
    history: int = 16

    def __post_init__(self) -> None:
        check_modules(self.modules)
        check_format(self.format, FP8)
        if self.gradient_format not in FP8:
            raise ValueError(f"fault.gradient_format={self.gradient_format!r} is not allowed: one of {', '.join(FP8)}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"fault.scaling={self.scaling!r} is not allowed: one of {', '.join(SCALINGS)}")
        if not 1 <= self.history <= MOST_UPDATES:
            raise ValueError(f"fault.history={self.history} is not allowed: 1 to {MOST_UPDATES} updates")
        super().__post_init__()

    def products(self, lag: int = 0, factor: float = 1.0) -> FP8Products:
        recipe = self.format, self.gradient_format, self.scaling, self.history
        return FP8Products(self.modules, *recipe, lag, factor)

    @property
    def where(self) -> dict[str, object]:
        return {"point": "formats", "modules": self.modules}

    @property
    def size(self) -> dict[str, object]:
        keys = ("format", "gradient_format", "scaling", "history")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True, kw_only=True)
class FP8Linear(FP8Fault):
    """Linear layers multiply FP8 numbers, each tensor with one scale, at the steps of a window.

    What it does: FP8 training as it is meant; with current scaling it is the healthy recipe of the format, beside which
    ``fp8_stale_scale`` is judged. Formats: OCP OFP8; recipe: arXiv:2209.05433. No report: it is no failure by itself.
    Equation: y = Q4(x) Q4(W)^T, dx = Q5(dy) Q4(W), dW = Q5(dy)^T Q4(x), with Q(t) = round(t s) / s, s = largest / amax
    in FP32, ties to even, and t s, 1 / s and the last product, by that 1 / s, rounded to FP32; NaN stays, and what is
    above the largest saturates, Inf too: 448 in E4M3, 57344 in E5M2.
    ``current``: amax of this tensor, in this micro-batch. ``delayed``: the largest of the last ``history`` updates,
    each the largest of its micro-batches; at the first faulty update none is known and s is 1. An evaluation uses the
    history and adds nothing to it; a checkpoint holds it. What a layer sees outside the window is not noted.

    Emulated (``faults.emulated_product``): operands are FP32 numbers of FP8's grid, sums are FP32. Taps see what was
    multiplied, so that the laws of linear layers hold with it; of experts they are left out by name. Experts have one
    scale for all of a layer's slots and one for their weights. Not modelled: a tensor core's own accumulator, scales of
    powers of 2, the transposed copies of a tensor, FP8 attention, FP8 communication and optimizer states.

    modules: names or patterns of linear layers, None for those of the blocks but routers; format: of x and W,
    gradient_format: of dy, ``fp8_e4m3``, ``fp8_e5m2`` or ``fp32``; as ``format``, ``fp32`` is the healthy control;
    scaling: of ``SCALINGS``; history: updates. Raises ValueError on impossible values, by name, and before training for
    a name of no linear layer and with ``train.compile``.
    """

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("formats", (self.products(),), self.window)

    def describe(self) -> InjectionCard:
        injection = self.injection("quantise", self.where, self.size, control=self.format == "fp32")
        return InjectionCard(self.family, (injection,))
