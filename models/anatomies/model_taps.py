"""Taps on a model that is not ours, at the parts that its anatomy names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from foreshock.models.anatomies.attention_capture import AttentionCapture
from foreshock.models.anatomies.norm_kind import NormKind
from foreshock.models.anatomies.parts import MLP_PARTS
from foreshock.models.anatomies.structure import lies_transposed, matrix
from foreshock.models.anatomy import LINEAR_LAYERS, NORMS, Anatomy
from foreshock.models.products import Product, Watching, product_of
from foreshock.models.taps import Tap, Taps, first_tensor, guarded, keep_output

EXPERTS = tuple(f"experts_{part}" for part in MLP_PARTS)
ONE_OPERATION = ("NativeLayerNormBackward0", "FusedRmsNormBackward0")
"""Nodes of the graph that are a norm."""
FROZEN = Product(unseen="its weight is frozen")


class ModelTaps(Taps):
    """As ``models.taps.Taps``, by the anatomy: attention by the name of its module, linear layers of any class, norms.

    The gradient of a norm's input through that norm alone is read off its node of the graph where it is one operation,
    as PyTorch's LayerNorm is. A norm of several has no such node, and a hook at its input would change the order of a
    sum, and with it training: there its own operations are run again, on the same numbers, after the backward.
    """

    def __init__(self, anatomy: Anatomy, places: Collection[str]) -> None:
        super().__init__(anatomy.model, ())
        self._capture: AttentionCapture | None = None
        if "linear" in places:
            self._taps["linear"] = {name: Tap(module) for name, module in _linear_layers(anatomy).items()}
        if "norm" in places:
            norms = _modules(anatomy, (*NORMS, "final_norm"))
            self._taps["norm"] = {name: Tap(module, kind=NormKind.of(module)) for name, module in norms.items()}
        if "dot_product" in places:
            names = [block.attention for block in anatomy.blocks if block.attention is not None]
            self._taps["dot_product"] = {name: Tap(anatomy.model.get_submodule(name)) for name in names}
            self._capture = AttentionCapture(self._taps["dot_product"])

    def __enter__(self) -> ModelTaps:
        super().__enter__()
        if self._capture is not None:
            self._capture.__enter__()
        return self

    def _set_hooks(self) -> None:
        for tap in self._taps.get("linear", {}).values():
            self._open_linear(tap)
        for tap in self._taps.get("norm", {}).values():
            self._open_norm(tap)
        if self._capture is not None:
            for name, tap in self._taps["dot_product"].items():
                self._open_attention(self._capture, name, tap)

    def end_forward(self) -> None:
        """Attention is looked at no longer; other hooks stay for a backward that computes a forward again."""
        if self._capture is not None:
            capture, self._capture = self._capture, None
            capture.__exit__(None, None, None)

    def __exit__(self, *raised: Any) -> None:
        self.end_forward()
        super().__exit__(*raised)
        for tap in self._taps.get("norm", {}).values():
            if tap.output_grad is not None and not tap.input_grads and tap.inputs:
                guarded(tap, _note_through)(tap)

    def _open_attention(self, capture: AttentionCapture, name: str, tap: Tap) -> None:
        enter, leave = guarded(tap, lambda *_: capture.enter(name)), guarded(tap, lambda *_: capture.leave())
        self._handles.append(tap.module.register_forward_pre_hook(enter))
        self._handles.append(tap.module.register_forward_hook(leave, always_call=True))

    def _open_norm(self, tap: Tap) -> None:
        tap.weight, tap.bias = (_copy(getattr(tap.module, name, None)) for name in ("weight", "bias"))

        def watch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            if not output.requires_grad:
                return  # an evaluation
            tap.inputs, tap.output = (first_tensor(arguments, named).detach(),), output.detach()
            output.register_hook(keep_output(tap))
            node = output.grad_fn
            if node is not None and node.name() in ONE_OPERATION:
                node.register_hook(guarded(tap, keep_input))

        def keep_input(gradients: tuple[Tensor, ...], _: Any) -> None:
            if gradients[0] is not None:
                tap.input_grads[0] = gradients[0].detach()

        self._handles.append(tap.module.register_forward_hook(guarded(tap, watch), with_kwargs=True))

    def _open_linear(self, tap: Tap) -> None:
        weight = tap.module.weight
        assert isinstance(weight, Tensor)
        turned = lies_transposed(tap.module)
        before = weight.detach().clone()
        tap.weight, tap.bias = before.mT if turned else before, _copy(getattr(tap.module, "bias", None))
        open_now: list[Watching] = []

        def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            open_now.append(Watching().__enter__())

        def end(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            seen = open_now.pop()
            seen.__exit__(None, None, None)
            first = output[0] if isinstance(output, tuple) else output
            if first is None or not first.requires_grad:
                return
            given = first_tensor(arguments, named)
            tap.inputs, tap.output = (given.detach(),), first.detach()
            first.register_hook(keep_output(tap))
            tap.product = FROZEN
            if weight.requires_grad:  # of any module with a weight, such as Conv1D of transformers
                tap.product = product_of(module, given, seen)  # type: ignore[arg-type]
            if turned and tap.product.w is not None:
                tap.product = Product(unseen="its weight lies transposed and is not what is multiplied")

        def keep(gradient: Tensor) -> None:
            copy = gradient.detach().clone()
            tap.weight_grad = copy.mT if turned else copy

        ends = guarded(tap, end)
        self._handles.append(tap.module.register_forward_pre_hook(guarded(tap, begin)))
        self._handles.append(tap.module.register_forward_hook(ends, prepend=True, always_call=True, with_kwargs=True))
        if weight.requires_grad:
            self._handles.append(weight.register_hook(guarded(tap, keep)))


def _copy(x: Any) -> Tensor | None:
    return x.detach().clone() if isinstance(x, Tensor) else None


def _modules(anatomy: Anatomy, roles: Collection[str]) -> dict[str, nn.Module]:
    """The modules that play one of these roles, in the model's order, each once."""
    names = {part.module for role in roles for part in anatomy.role(role)}
    return {name: module for name, module in anatomy.model.named_modules() if name in names}


def _linear_layers(anatomy: Anatomy) -> Mapping[str, nn.Module]:
    """Those with one weight of two axes; experts with a weight of three have products of their own kind."""
    roles = [role for role in (*LINEAR_LAYERS, "head") if role not in EXPERTS]
    return {name: module for name, module in _modules(anatomy, roles).items() if matrix(module) is not None}


def _note_through(tap: Tap) -> None:
    tap.input_grads[0] = _through(tap)


def _through(tap: Tap) -> Tensor:
    """The gradient of a norm's input for its output's, by its own operations at the weights that it had."""
    parameters = {name: value for name, value in (("weight", tap.weight), ("bias", tap.bias)) if value is not None}
    with torch.enable_grad():
        x = tap.inputs[0].detach().requires_grad_()
        y = torch.func.functional_call(tap.module, parameters, (x,))
        (gradient,) = torch.autograd.grad(y, x, tap.output_grad)
    return gradient
