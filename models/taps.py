"""Taps: what goes into and comes out of chosen modules in one step, and the gradients that come back.

A tap reads a module from outside, by PyTorch's own hooks, so it is the same for every attention backend and the
model's code knows nothing of it. It changes no bit of training. Hooks are set for the one step that is
watched and taken off again: a step that nobody watches pays nothing.

Tapped values are the clean ones outside a kernel, never the copies that it saved for its own backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Generic, Literal, TypeGuard, TypeVar, overload

import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from foreshock.models.anatomies.attention_call import AttentionCall
from foreshock.models.anatomies.norm_kind import NormKind
from foreshock.models.attention import DotProduct
from foreshock.models.moe import GroupedLinear
from foreshock.models.numerics import at_least_fp32
from foreshock.models.products import Product, Watching, product_of
from foreshock.models.recomputing import recomputing

PLACES: Mapping[str, tuple[type[nn.Module], ...]] = {
    "dot_product": (DotProduct,),
    "linear": (nn.Linear, GroupedLinear),
    "norm": (nn.LayerNorm, nn.RMSNorm),
}
"""What can be tapped: q, k, v and o of attention's dot product, after RoPE and QK-norm; every linear layer, the
router, the experts and the head among them; every norm."""

LinearModule = nn.Linear | GroupedLinear
NormModule = nn.LayerNorm | nn.RMSNorm
M_co = TypeVar("M_co", bound=nn.Module, covariant=True)
T = TypeVar("T")
Hook = TypeVar("Hook", bound=Callable[..., Any])


def known(value: T | None, name: str) -> T:
    """A value that some steps lack; name: what the error calls it. Raises ValueError where this step does."""
    if value is None:
        raise ValueError(f"this monitor reads {name}, and the step has none")
    return value


@dataclass
class Tap(Generic[M_co]):
    """One module in one step. Tensors are detached, on the device, and not to be written.

    inputs: its tensor arguments that carry a gradient, in order; output; output_grad: the gradient of the step's
    objective with respect to it; input_grads: those of the inputs, by index, through this module alone. A linear layer
    has none: its input feeds others too, and to part them would change the order in which their
    gradients are added, and with it training. It has its weight before the update, and weight_grad, not yet clipped,
    and the product that its forward made of input and weight, where x, w and dw are what was multiplied and the
    gradient at that weight; a norm with a bias, and a linear layer with one, has its bias before the update. Of a dot
    product call says which kernel ran and how, of a norm kind what it computes. failure: what a hook raised in place
    of looking, or None; arrivals: how many gradients its outputs got, more than 1 for a module that is called again.
    """

    module: M_co
    inputs: tuple[Tensor, ...] = ()
    output: Tensor | None = None
    input_grads: dict[int, Tensor] = field(default_factory=dict)
    output_grad: Tensor | None = None
    weight: Tensor | None = None
    weight_grad: Tensor | None = None
    bias: Tensor | None = None
    product: Product | None = None
    call: AttentionCall | None = None
    kind: NormKind | None = None
    failure: Exception | None = None
    arrivals: int = 0

    def of_rows(self, rows: tuple[int, int]) -> Tap:
        """The tap of a layer that a fused one has as these of its outputs; its input is the same."""
        own = slice(*rows)

        def cut(x: Tensor | None, axis: int = -2) -> Tensor | None:
            return None if x is None else x[own] if x.ndim == 1 else x[..., own, :] if axis == -2 else x[..., own]

        product = self.product
        if product is not None:
            product = replace(product, w=cut(product.w), dw=cut(product.dw))
        return replace(
            self,
            output=cut(self.output, -1),
            output_grad=cut(self.output_grad, -1),
            weight=cut(self.weight),
            weight_grad=cut(self.weight_grad),
            bias=cut(self.bias),
            product=product,
        )

    @property
    def y(self) -> Tensor:
        """What a linear layer made of its weight: the output, less its bias where it has one."""
        if self.weight is None or self.bias is None:
            return self.out
        return at_least_fp32(self.out) - self.bias.to(at_least_fp32(self.out).dtype)

    @property
    def x(self) -> Tensor:
        """The input of a linear layer as its product took it."""
        product = known(self.product, "the product of a tapped layer")
        return self.inputs[0].to(product.dtype) if product.x is None else product.x

    @property
    def w(self) -> Tensor:
        """The weight of a linear layer as its product took it."""
        product = known(self.product, "the product of a tapped layer")
        return known(self.weight, "a tapped weight").to(product.dtype) if product.w is None else product.w

    @property
    def dw(self) -> Tensor:
        """The gradient at ``w``: of the weight itself where ``w`` is that or its cast, whose backward passes it on."""
        product = known(self.product, "the product of a tapped layer")
        return known(self.weight_grad if product.w is None else product.dw, "the gradient at a tapped weight")

    @property
    def out(self) -> Tensor:
        """The output, of a module that took part in the step."""
        return known(self.output, "the output of a tapped module")

    @property
    def known_call(self) -> AttentionCall:
        """Of a dot product that took part in the step."""
        return known(self.call, "the call of a tapped dot product")

    @property
    def dout(self) -> Tensor:
        """The gradient at it."""
        return known(self.output_grad, "the gradient at a tapped output")


def guarded(tap: Tap, hook: Hook) -> Hook:
    """The hook, but what it raises is the tap's failure and never reaches training."""

    @wraps(hook)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        try:
            return hook(*arguments, **named)
        except Exception as error:
            tap.failure = error
            return None

    return wrapper  # type: ignore[return-value]


def first_tensor(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """A module's input, by position or by keyword. Raises ValueError where it was given no tensor."""
    given = next((x for x in (*arguments, *named.values()) if isinstance(x, Tensor)), None)
    if given is None:
        raise ValueError("its module was called without a tensor")
    return given


class Taps:
    """Taps on all modules of the named places, while the context is open.

    ``taps.at(place)`` maps a module's name, such as ``blocks.0.attention.dot_product``, to its Tap, in the
    model's order. Raises ValueError for an unknown place.
    """

    def __init__(self, model: nn.Module, places: Collection[str]) -> None:
        for place in places:
            if place not in PLACES:
                raise ValueError(f"tap place {place!r} is not allowed: one of {', '.join(PLACES)}")
        self._taps: dict[str, dict[str, Tap[Any]]] = {
            place: {name: _tap(module) for name, module in model.named_modules() if isinstance(module, PLACES[place])}
            for place in places
        }
        self._handles: list[RemovableHandle] = []

    @property
    def places(self) -> frozenset[str]:
        """What is tapped."""
        return frozenset(self._taps)

    @overload
    def at(self, place: Literal["dot_product"]) -> Mapping[str, Tap[DotProduct]]: ...

    @overload
    def at(self, place: Literal["linear"]) -> Mapping[str, Tap[LinearModule]]: ...

    @overload
    def at(self, place: Literal["norm"]) -> Mapping[str, Tap[NormModule]]: ...

    @overload
    def at(self, place: str) -> Mapping[str, Tap[nn.Module]]: ...

    def at(self, place: str) -> Mapping[str, Tap[Any]]:
        if place not in self._taps:
            raise ValueError(f"nobody asked to tap {place!r} at this step: name it in the monitor's taps")
        return self._taps[place]

    def __enter__(self) -> Taps:
        try:
            self._set_hooks()
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _set_hooks(self) -> None:
        for taps in self._taps.values():
            for tap in taps.values():
                if isinstance(tap.module, PLACES["norm"]):
                    self._handles.append(tap.module.register_forward_pre_hook(guarded(tap, _alias_inputs)))
                    if (bias := getattr(tap.module, "bias", None)) is not None:
                        tap.bias = bias.detach().clone()
                self._handles.append(tap.module.register_forward_hook(_watch(tap), with_kwargs=True))
                if _is_linear(tap.module):
                    self._handles += _watch_product(tap)
                    tap.weight = tap.module.weight.detach().clone()
                    self._handles.append(tap.module.weight.register_hook(_keep(tap, "weight_grad", copy=True)))


def _tap(module: nn.Module) -> Tap[Any]:
    """An empty one, with what the module by itself says of its call or kind."""
    if isinstance(module, DotProduct):
        return Tap(module, call=AttentionCall.of_module(module))
    return Tap(module, kind=NormKind.of(module) if isinstance(module, PLACES["norm"]) else None)


def _is_linear(module: nn.Module) -> TypeGuard[LinearModule]:
    return isinstance(module, PLACES["linear"])


def _alias_inputs(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give each input a name of its own, so that its gradient is that of this branch and not of the residual stream.

    Two gradients add up to the same bits in either order; with a third branch they would not.
    """
    return tuple(a.view_as(a) if isinstance(a, Tensor) and a.requires_grad else a for a in arguments)


def _watch(tap: Tap) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad or recomputing():
            return  # an evaluation, or what the network does not see
        watched = [a for a in (*arguments, *named.values()) if isinstance(a, Tensor) and a.requires_grad]
        tap.inputs, tap.output = tuple(a.detach() for a in watched), output.detach()
        for index, value in enumerate(watched if tap.weight is None else ()):
            value.register_hook(_keep_input(tap, index))
        output.register_hook(keep_output(tap))

    return guarded(tap, hook)


def _watch_product(tap: Tap) -> list[RemovableHandle]:
    """Note what the module's forward multiplies, from its first operation to its last, whether it returns or raises."""
    open_now: list[Watching] = []

    def begin(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if recomputing():
            return
        open_now.append(Watching().__enter__())

    def end(module: LinearModule, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor | None) -> None:
        if recomputing():
            return
        seen = open_now.pop()
        seen.__exit__(None, None, None)
        if output is not None and output.requires_grad:
            tap.product = product_of(module, first_tensor(arguments, named), seen)

    begins = tap.module.register_forward_pre_hook(guarded(tap, begin))
    ends = tap.module.register_forward_hook(guarded(tap, end), prepend=True, always_call=True, with_kwargs=True)
    return [begins, ends]


def keep_output(tap: Tap, turn: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Tensor], None]:
    """A hook that keeps the gradient at a module's output, turned as the output was, and counts it."""

    def hook(gradient: Tensor) -> None:
        tap.output_grad = turn(gradient.detach())
        tap.arrivals += 1

    return guarded(tap, hook)


def _keep(tap: Tap, name: str, copy: bool = False) -> Callable[[Tensor], None]:
    """copy: the tensor may become a parameter's ``grad``, which the clip scales in place."""

    def hook(gradient: Tensor) -> None:
        setattr(tap, name, gradient.detach().clone() if copy else gradient.detach())

    return guarded(tap, hook)


def _keep_input(tap: Tap, index: int) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        tap.input_grads[index] = gradient.detach()

    return guarded(tap, hook)


NO_TAPS: Taps = Taps(nn.Module(), ())
