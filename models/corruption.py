"""Operations on what any module takes and gives: linear layers, norms, the router, the head.

Attention's dot product has sites of its own, inside its kernel (``models.numerics``). Everything else is corrupted
from outside, by PyTorch's hooks, as the module's own kernel would: what comes out of it is wrong for all who
read it. A healthy step sets no hook and pays nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from typing import Any, ClassVar, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from foreshock.models.attention import DotProduct
from foreshock.models.bits import BitOperation
from foreshock.models.transformer import TransformerConfig, skeleton

MODULE_SITES = ("y", "dy", "dx", "dw")
"""Of a module: its output; the gradient that arrives at its output (of the head: what the loss kernel computed); the
gradient that it hands to its input; its weight's gradient, of a shared weight what this module's product adds to it."""


class Log(Protocol):
    """Where a change is counted (``faults.log.InjectionLog``)."""

    def wants(self, point: str, operation: Any, tensor: str) -> bool: ...

    def add(self, point: str, operation: Any, tensor: str, before: Tensor, after: Tensor) -> None: ...


class Removable(Protocol):
    """A change of a module that can be taken back."""

    def remove(self) -> None: ...


class Remembered(Protocol):
    """What a run keeps of its past (``faults.past.Past``)."""

    def tensor(self, point: str, step: int, name: str) -> Tensor: ...


class ModuleChange(Protocol):
    """What is done to modules while the forward and the backward of a step run: a frozen value.

    ``find`` gives what it is done to, in a form of its own, and raises ValueError where the model has no place for it;
    ``change`` does it, and hands back what takes it back.
    """

    stackable: ClassVar[bool] = False
    lookback_steps: ClassVar[int] = 0

    @property
    def idle(self) -> bool: ...

    @property
    def changes_forward(self) -> bool:
        """Whether the same weights give another loss than without it; of a kind that says nothing, where not idle."""
        return not self.idle

    @property
    def target(self) -> tuple[str, str]:
        """Module and tensor (``MODULE_SITES`` where hooks do it), of which no two changes may be done to one."""

    def meets(self, other: ModuleChange) -> bool:
        return self.target == other.target

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        """Raise ValueError where the model has no such module, or where ``train.compile`` leaves no place for hooks."""
        self.find(skeleton(model))
        if train.compile:
            raise ValueError("train.compile=True has no fault sites outside attention: set train.compile=false")

    @property
    def reads(self) -> tuple[int, str] | None:
        """The step at whose begin it needs a parameter as that was, and the parameter's name; None for none."""
        return None

    def remembering(self, past: Remembered) -> ModuleChange:
        """The same with what it ``reads``."""
        return self

    def find(self, model: nn.Module) -> Any: ...

    def change(self, place: Any, log: Log | None) -> Sequence[Removable]: ...


@dataclass(frozen=True)
class TensorChange(ModuleChange):
    """A change of one tensor of one module, done by hooks. module: its name; site: one of ``SITES``.

    Those of ``GRADIENTS`` leave the forward as it is.
    """

    SITES: ClassVar[tuple[str, ...]] = MODULE_SITES
    GRADIENTS: ClassVar[tuple[str, ...]] = ("dy", "dx", "dw")

    module: str
    site: str

    def __post_init__(self) -> None:
        if self.site not in self.SITES:
            raise ValueError(f"site={self.site!r} is not allowed: one of {', '.join(self.SITES)}")

    @property
    def changes_forward(self) -> bool:
        return not self.idle and self.site not in self.GRADIENTS

    @property
    def target(self) -> tuple[str, str]:
        return self.module, self.site

    @staticmethod
    def has_place(name: str, module: nn.Module) -> bool:
        """Whether a module can be named."""
        return has_weight(module)

    def find(self, model: nn.Module) -> nn.Module:
        """The module. Raises ValueError where the model has none of that name, or one without a place for this."""
        known = {name: module for name, module in model.named_modules() if self.has_place(name, module)}
        if self.module not in known:
            near = difflib.get_close_matches(self.module, known, n=4, cutoff=0.0)
            raise ValueError(f"fault.modules: the model has no {self.module!r}; the nearest are {', '.join(near)}")
        return known[self.module]

    def corrupt(self, x: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
        """The changed tensor. arguments: those of the module's forward."""
        raise NotImplementedError

    def change(self, place: nn.Module, log: Log | None) -> Sequence[Removable]:
        return hooks(place, self.target[1], partial(_corrupt_and_log, self, log, self.module))


@dataclass(frozen=True)
class ModuleFault(TensorChange):
    """One bit operation on one tensor of one module, in FP32 but for the elements hit, which are rounded to BF16 first.

    module: its name, such as ``blocks.0.mlp.input``; site: one of ``MODULE_SITES``; rounding, bits, share: see
    ``models.bits.BitOperation``; the share is of each sequence's elements, and of the whole tensor where it has no
    sequences: the weight's gradient, a router's tokens, the slots of experts.
    """

    rounding: str
    bits: int
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.operation  # noqa: B018  (building it checks its fields)

    @cached_property
    def operation(self) -> BitOperation:
        return BitOperation(self.rounding, self.bits, self.share)

    @property
    def idle(self) -> bool:
        return self.bits == 0

    def corrupt(self, x: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
        shape = x.shape[1:] if x.ndim > 2 else x.shape
        return self.operation(x.detach(), self.operation.hits(shape, x.device))


def has_weight(module: nn.Module) -> bool:
    """Whether it is a linear layer, a norm, a router or experts."""
    return getattr(module, "weight", None) is not None and not isinstance(module, (DotProduct, nn.Embedding))


class Corrupted:
    """The changes of a model's modules, while the context is open.

    Open it before ``models.taps.Taps``, so that a tap sees what the rest of the model sees. An idle one is left out: it
    does nothing. log: where the changes are counted, or None.
    Raises ValueError where the model has no such module, or two of them would change one tensor.
    """

    def __init__(self, model: nn.Module, changes: Collection[ModuleChange], log: Log | None = None) -> None:
        for change, other in combinations(changes, 2):
            if change.meets(other) or other.meets(change):
                module, site = change.target
                raise ValueError(f"2 faults on {site!r} of {module} meet: one operation a tensor is allowed")
        places = [(change, change.find(model)) for change in changes]
        self._active = [(change, place) for change, place in places if not change.idle]
        self._log = log
        self._handles: list[Removable] = []

    def __enter__(self) -> Corrupted:
        for change, place in self._active:
            self._handles += change.change(place, self._log)
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


Corruption = Callable[[Tensor, nn.Module, tuple[Any, ...]], Tensor]
"""From a tensor to a corrupted copy, given the module and the arguments of its forward."""


def _corrupt_and_log(
    change: TensorChange, log: Log | None, name: str, x: Tensor, module: nn.Module, arguments: tuple[Any, ...]
) -> Tensor:
    corrupted = change.corrupt(x, module, arguments)
    if log is not None:
        log.add("modules", change, f"{name} {change.site}", x.detach(), corrupted)
    return corrupted


def hooks(module: nn.Module, site: str, corrupt: Corruption) -> list[Removable]:
    """Hooks that corrupt one tensor of a module, by its site."""
    handles: list[Removable] = []
    if site in _BEFORE:
        handles.append(module.register_forward_pre_hook(_BEFORE[site](corrupt)))
    handles.append(module.register_forward_hook(_AFTER[site](corrupt)))
    return [*handles, OwnWeight(module)] if site == "dw" else handles


@dataclass(frozen=True)
class OwnWeight:
    """Takes an alias of the weight back, which a forward that raised has left."""

    module: nn.Module

    def remove(self) -> None:
        own_weight_again(self.module)


class Replaced(torch.autograd.Function):
    """A value in the place of another, whose gradient it takes: what a kernel that errs does."""

    @staticmethod
    def forward(ctx, value: Tensor, corrupt: Callable[[Tensor], Tensor]) -> Tensor:
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
            alias.register_hook(lambda gradient: corrupt(gradient, module, arguments))
        module.__dict__["weight"] = alias  # found before the parameter, which stays where it is

    return hook


def _own_weight(_: Corruption) -> Callable[..., None]:
    return lambda module, arguments, output: own_weight_again(module)


def own_weight_again(module: nn.Module) -> None:
    module.__dict__.pop("weight", None)


def _first(output: Any) -> Tensor:
    """The tensor of an output; a block and experts give their routing beside it."""
    return output[0] if isinstance(output, tuple) else output


def _output(corrupt: Corruption) -> Callable[..., Any]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        replaced = Replaced.apply(_first(output), lambda value: corrupt(value, module, arguments))
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    return hook


def _arriving(corrupt: Corruption) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if _first(output).requires_grad:
            _first(output).register_hook(lambda gradient: corrupt(gradient, module, arguments))

    return hook


def _leaving(corrupt: Corruption) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments[0].requires_grad:
            arguments[0].register_hook(lambda gradient: corrupt(gradient, module, arguments))

    return hook


_BEFORE: dict[str, Callable[[Corruption], Callable[..., Any]]] = {"dx": _alias_input, "dw": _alias_weight}
_AFTER: dict[str, Callable[[Corruption], Callable[..., Any]]] = {
    "y": _output,
    "dy": _arriving,
    "dx": _leaving,
    "dw": _own_weight,
}
"""What is done before and after a module's forward, by site."""
