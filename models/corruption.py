"""Bit operations on what any module takes and gives: linear layers, norms, the router, the head.

Attention's dot product has sites of its own, inside its kernel (``models.numerics``). Everything else is corrupted
from outside, by PyTorch's hooks, as the module's own kernel would: what comes out of it is wrong for all who
read it. A healthy step sets no hook and pays nothing.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from foreshock.models.attention import DotProduct
from foreshock.models.bits import BitOperation
from foreshock.models.transformer import TransformerConfig, skeleton

MODULE_SITES = ("y", "dy", "dx", "dw")
"""Of a module: its output; the gradient that arrives at its output (of the head: what the loss kernel computed); the
gradient that it hands to its input; its weight's gradient, of a shared weight what this module's product adds to it."""


@dataclass(frozen=True)
class ModuleFault:
    """One bit operation on one tensor of one module, in FP32 but for the elements hit, which are rounded to BF16 first.

    module: its name, such as ``blocks.0.mlp.input``; site: one of ``MODULE_SITES``; rounding, bits, share: see
    ``models.bits.BitOperation``; the share is of each sequence's elements, and of the whole tensor where it has no
    sequences: the weight's gradient, a router's tokens, the slots of experts.
    """

    stackable: ClassVar[bool] = False
    lookback_steps: ClassVar[int] = 0

    module: str
    site: str
    rounding: str
    bits: int
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.site not in MODULE_SITES:
            raise ValueError(f"site={self.site!r} is not allowed: one of {', '.join(MODULE_SITES)}")
        self.operation  # noqa: B018  (building it checks its fields)

    @cached_property
    def operation(self) -> BitOperation:
        return BitOperation(self.rounding, self.bits, self.share)

    @property
    def idle(self) -> bool:
        return self.bits == 0

    def meets(self, other: ModuleFault) -> bool:
        return (self.module, self.site) == (other.module, other.site)

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        """Raise ValueError where the model has no such module, or where ``train.compile`` leaves no place for hooks."""
        self.find(skeleton(model))
        if train.compile:
            raise ValueError("train.compile=True has no fault sites outside attention: set train.compile=false")

    def find(self, model: nn.Module) -> nn.Module:
        """The module. Raises ValueError where the model has none of that name, or one without a weight."""
        known = {name: module for name, module in model.named_modules() if _has_weight(module)}
        if self.module not in known:
            near = difflib.get_close_matches(self.module, known, n=4, cutoff=0.0)
            raise ValueError(f"fault.modules: the model has no {self.module!r}; the nearest are {', '.join(near)}")
        return known[self.module]

    def corrupt(self, x: Tensor) -> Tensor:
        shape = x.shape[1:] if x.ndim > 2 else x.shape
        return self.operation(x.detach(), self.operation.hits(shape, x.device))


def _has_weight(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None and not isinstance(module, (DotProduct, nn.Embedding))


class Log(Protocol):
    """Where a change is counted (``faults.log.InjectionLog``)."""

    def add(self, point: str, operation: Any, tensor: str, before: Tensor, after: Tensor) -> None: ...


class Corrupted:
    """The faults on a model's modules, while the context is open.

    Open it before ``models.taps.Taps``, so that a tap sees what the rest of the model sees. ``bits=0`` is left out: it
    does nothing. log: where the changes are counted, or None.
    Raises ValueError where the model has no such module, or two faults would corrupt one tensor.
    """

    def __init__(self, model: nn.Module, faults: Collection[ModuleFault], log: Log | None = None) -> None:
        for (module, site), count in Counter((fault.module, fault.site) for fault in faults).items():
            if count > 1:
                raise ValueError(f"{count} faults on {site!r} of {module} meet: one operation a tensor is allowed")
        found = [(fault, fault.find(model)) for fault in faults]
        self._broken = [(fault, module) for fault, module in found if not fault.idle]
        self._log = log
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Corrupted:
        for fault, module in self._broken:
            corrupt = fault.corrupt if self._log is None else partial(_corrupt_and_log, fault, self._log)
            if fault.site in _BEFORE:
                self._handles.append(module.register_forward_pre_hook(_BEFORE[fault.site](corrupt)))
            self._handles.append(module.register_forward_hook(_AFTER[fault.site](corrupt)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for _, module in self._broken:  # type: ignore[assignment]  # nobody reads ``_``
            _own_weight_again(module)  # a forward that raised has left its alias


Corruption = Callable[[Tensor], Tensor]
"""From a tensor to a corrupted copy."""


def _corrupt_and_log(fault: ModuleFault, log: Log, x: Tensor) -> Tensor:
    corrupted = fault.corrupt(x)
    log.add("modules", fault, f"{fault.module} {fault.site}", x.detach(), corrupted)
    return corrupted


class _Replaced(torch.autograd.Function):
    """A value in the place of another, whose gradient it takes: what a kernel that errs does."""

    @staticmethod
    def forward(ctx, value: Tensor, corrupt: Corruption) -> Tensor:
        return corrupt(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _alias_input(_: Corruption) -> Callable[..., tuple[Any, ...]]:
    """Give the input a name of its own, so that the gradient of this branch alone is corrupted."""

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].view_as(arguments[0]), *arguments[1:])

    return hook


def _alias_weight(corrupt: Corruption) -> Callable[..., None]:
    """Give the weight a name of its own for this forward, so that of a shared one this product's gradient is corrupted.

    A tied head's weight is the embedding's too, whose share of the gradient comes from another kernel.
    """

    def hook(module: nn.Linear | nn.LayerNorm | nn.RMSNorm, arguments: tuple[Any, ...]) -> None:
        alias = module.weight.view_as(module.weight)
        if alias.requires_grad:
            alias.register_hook(corrupt)
        module.__dict__["weight"] = alias  # found before the parameter, which stays where it is

    return hook


def _own_weight(_: Corruption) -> Callable[..., None]:
    return lambda module, arguments, output: _own_weight_again(module)


def _own_weight_again(module: nn.Module) -> None:
    module.__dict__.pop("weight", None)


def _output(corrupt: Corruption) -> Callable[..., Tensor]:
    return lambda module, arguments, output: _Replaced.apply(output, corrupt)


def _arriving(corrupt: Corruption) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(corrupt)

    return hook


def _leaving(corrupt: Corruption) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if arguments[0].requires_grad:
            arguments[0].register_hook(corrupt)

    return hook


_BEFORE: dict[str, Callable[[Corruption], Callable[..., Any]]] = {"dx": _alias_input, "dw": _alias_weight}
_AFTER: dict[str, Callable[[Corruption], Callable[..., Any]]] = {
    "y": _output,
    "dy": _arriving,
    "dx": _leaving,
    "dw": _own_weight,
}
"""What is done before and after a module's forward, by site."""
