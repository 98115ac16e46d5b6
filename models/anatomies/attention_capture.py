"""q, k, v and o of every block's attention, whichever way its forward computes it, with the gradients that come back.

PyTorch shows every function that a module calls to a ``TorchFunctionMode``. Seen are ``scaled_dot_product_attention``,
and eager attention: a product of four axes, a softmax of its result, and a product with that. A kernel of another kind
is seen where its owner has wrapped it (``watched_attention``). Tensors are those that the kernel received and returned,
so that a group's keys are repeated where the model repeats them. No bit of training changes.

Shapes: B batch rows, H query heads, G key-value heads, T tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from foreshock.models.anatomies.attention_call import CUSTOM, EAGER, REFERENCE, TORCH_FLASH, TORCH_OTHER, AttentionCall
from foreshock.models.products import multiplied_in
from foreshock.models.taps import Tap, guarded, keep_output
from foreshock.models.visibility import visible_keys

PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
DROPOUTS = (F.dropout, torch.dropout)
HIDDEN = -9e3
"""A score below this is masked; models add -1e4 or less."""
SDPA = F.scaled_dot_product_attention
SDPA_NAME = "scaled_dot_product_attention"
"""Of PyTorch's own, which a function in its place may have called before this module was imported."""
FLASH = 1
"""``SDPBackend.FLASH_ATTENTION``, as PyTorch's own choice names it."""
LAYOUTS = ("BHTD", "BTHD")

Turn = Callable[[Tensor], Tensor]
NOT_CAUSAL = "its mask is not causal: of padding, documents or another kind"
Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(x: Tensor) -> Tensor:
    return x.mT


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


AS_THEY_ARE = (_same, _same, _same, _same)


@dataclass
class _Eager:
    """An eager attention on its way: its scores, then its softmax."""

    q: Tensor
    k_transposed: Tensor
    scores: Tensor
    call: AttentionCall | None = None
    p: Tensor | None = None


@dataclass
class AttentionCapture(TorchFunctionMode):
    """Fills the taps of attention modules while it is open. taps: by the name of a block's attention module.

    ``enter`` and ``leave`` are called around each such module's forward, by hooks.
    """

    taps: Mapping[str, Tap]
    inside: list[str] = field(default_factory=list)
    _eager: _Eager | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def enter(self, name: str) -> None:
        self.inside.append(name)
        self._eager = None

    def leave(self) -> None:
        self.inside.pop()
        self._eager = None

    def __enter__(self) -> AttentionCapture:
        _OPEN.append(self)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        _OPEN.remove(self)
        super().__exit__(*raised)

    def __torch_function__(
        self, function: Callable, types: Sequence[type], arguments: tuple = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        if self.inside and torch.is_grad_enabled():
            guarded(self.taps[self.inside[-1]], self._look)(function, arguments, named or {}, result)
        return result

    def _look(self, function: Callable, arguments: tuple, named: Mapping[str, Any], result: Any) -> None:
        if getattr(function, "__name__", "") == SDPA_NAME:
            *inputs, call = _of_torch(*arguments, **named)
            self.fill((*inputs, result), call)
        elif function in PRODUCTS and len(arguments) == 2 and all(isinstance(x, Tensor) for x in arguments):
            self._product(*arguments, result)
        elif (
            function in SOFTMAXES
            and self._eager is not None
            and _first(arguments, named).shape == self._eager.scores.shape
        ):
            module = self.taps[self.inside[-1]].module
            self._eager.call = _of_eager(self._eager, _first(arguments, named), module)
            self._eager.p = result
        elif function in DROPOUTS and self._eager is not None and self._eager.call is not None:
            p, training = _dropout(arguments, named)
            if training and p:
                self._eager.call = replace(self._eager.call, dropout=p)

    def _product(self, x: Tensor, y: Tensor, result: Tensor) -> None:
        eager = self._eager
        if x.ndim != 4 or y.ndim != 4:
            return
        if eager is not None and eager.p is not None and x.shape == eager.p.shape and eager.call is not None:
            self.fill((eager.q, eager.k_transposed, y, result), eager.call, (_same, _transposed, _same, _same))
            self._eager = None
        elif x.shape[-1] == y.shape[-2]:
            self._eager = _Eager(x, y, result)

    def fill(self, tensors: Sequence[Tensor], call: AttentionCall, turns: Sequence[Turn] = AS_THEY_ARE) -> None:
        """Note a call of the module that is open, and the gradients of its tensors as they arrive.

        tensors: q, k, v, o; turns: what makes of each (B, H, T, D), a view, which its gradient is turned by too.
        """
        tap, o = self.taps[self.inside[-1]], tensors[3]
        if not o.requires_grad:
            return
        if tap.output is not None:
            call = AttentionCall(call.kernel, unreadable="its module calls attention more than once")
        tap.call, tap.input_grads = call, {}
        *inputs, tap.output = (turn(x.detach()) for x, turn in zip(tensors, turns, strict=True))
        tap.inputs = tuple(inputs)
        for index, (x, turn) in enumerate(zip(tensors[:3], turns[:3], strict=True)):
            if x.requires_grad:
                x.register_hook(_keep_input(tap, index, turn))
        o.register_hook(keep_output(tap, turns[3]))


_OPEN: list[AttentionCapture] = []


def _keep_input(tap: Tap, index: int, turn: Turn) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        tap.input_grads[index] = turn(gradient.detach())

    return guarded(tap, hook)


def _first(arguments: tuple, named: Mapping[str, Any]) -> Tensor:
    found: Tensor = arguments[0] if arguments else named["input"]
    return found


def _dropout(arguments: tuple, named: Mapping[str, Any]) -> tuple[float, bool]:
    """p, and whether it acts."""
    p = arguments[1] if len(arguments) > 1 else named.get("p", 0.5)
    return float(p), bool(arguments[2] if len(arguments) > 2 else named.get("training", named.get("train", True)))


def _of_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """A call of ``scaled_dot_product_attention``, with its own parameters."""
    kernel = TORCH_OTHER
    if query.device.type == "cpu":
        dtype = multiplied_in(query)
        q, k, v = (x.detach().to(dtype) for x in (query, key, value))
        choice = torch._fused_sdp_choice(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        kernel = TORCH_FLASH if choice == FLASH else TORCH_OTHER
    window, unreadable = None, None
    if query.ndim != 4 or query.shape[-2] != key.shape[-2]:
        unreadable = "its queries are not as many as its keys"
    elif attn_mask is not None:
        window, unreadable = _window(attn_mask if attn_mask.dtype is torch.bool else attn_mask > HIDDEN)
        if unreadable is None and attn_mask.dtype is not torch.bool and bool((attn_mask * (attn_mask > HIDDEN)).any()):
            unreadable = "its mask adds a bias to scores"
    elif not is_causal:
        unreadable = NOT_CAUSAL
    call = AttentionCall(kernel, window, scale, multiplied_in(query), None, unreadable, dropout_p)
    return query, key, value, call


def _window(seen: Tensor) -> tuple[int | None, str | None]:
    """How many keys a query sees by a mask, (..., T, T), True where it does; or why that cannot be said."""
    tokens = seen.shape[-1]
    if seen.shape[-2] != tokens:
        return None, "its queries are not as many as its keys"
    width = int(seen[..., -1, :].sum(-1).max())
    window = None if width >= tokens else max(width, 1)
    alike = torch.equal(seen, visible_keys(tokens, window, seen.device).expand_as(seen))
    return window, None if alike else NOT_CAUSAL


def _of_eager(eager: _Eager, softened: Tensor, module: nn.Module) -> AttentionCall:
    """The call of an eager attention. softened: what goes into its softmax: scores, scaled and masked."""
    dtype, scores = multiplied_in(eager.q), eager.scores
    if scores.shape[-1] != scores.shape[-2]:
        return AttentionCall(EAGER, dtype=dtype, unreadable="its queries are not as many as its keys")
    own, given = (x.detach().diagonal(dim1=-2, dim2=-1).double() for x in (scores, softened))
    width = eager.q.shape[-1]
    named = [getattr(module, name, None) for name in ("scaling", "scale", "softmax_scale")]
    usual = [*(value for value in named if isinstance(value, float)), 1 / math.sqrt(width), 1.0]
    square = float(own.square().sum())
    scale = usual[0] if square == 0 else float((own * given).sum()) / square
    rounding = 2.0**-6 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    near = [value for value in usual if abs(value - scale) <= rounding * abs(value)]
    scale = near[0] if near else scale
    if float((given - scale * own).abs().max()) > rounding * float(given.abs().max()):
        return AttentionCall(EAGER, dtype=dtype, unreadable="its scores are changed on their way to softmax")
    window, unreadable = _window(softened.detach()[:, 0] > HIDDEN)
    return AttentionCall(EAGER, window, scale, dtype, None, unreadable)


def watched_attention(
    kernel: Kernel,
    *,
    layout: str = "BHTD",
    output_layout: str | None = None,
    scale: float | None = None,
    window: int | None = None,
    rounds_like: str | None = None,
) -> Kernel:
    """A causal attention kernel of your own, such that an attached watch sees it. It computes what it did.

    kernel: its first three tensors of four axes are q, k and v; it returns o, or a tuple that begins with it.
    layout: of q, k and v; output_layout: of o, ``layout`` by default. scale: of q k^T, None for 1 / sqrt(D), or what
    the call names ``scale``, ``scaling`` or ``softmax_scale``. window: keys that a query sees, None for all before it.
    rounds_like: ``reference`` for a kernel that takes BF16, adds up in FP32 and stores P, dS, O, dQ, dK and dV in BF16;
    None: its rounding is not known, and laws have residuals alone. Raises ValueError for another value.

        from transformers import AttentionInterface
        AttentionInterface.register("mine", foreshock.watched_attention(mine, output_layout="BTHD"))
    """
    for name, value in (("layout", layout), ("output_layout", output_layout or layout)):
        if value not in LAYOUTS:
            raise ValueError(f"{name}={value!r} is not allowed: one of {', '.join(LAYOUTS)}")
    if rounds_like not in (None, REFERENCE):
        raise ValueError(f"rounds_like={rounds_like!r} is not allowed: {REFERENCE!r} or None")

    @wraps(kernel)
    def watched(*arguments: Any, **named: Any) -> Any:
        capture = _OPEN[-1] if _OPEN else None
        if capture is None or not capture.inside or not torch.is_grad_enabled():
            return kernel(*arguments, **named)
        name = capture.inside[-1]
        capture.inside.clear()  # what the kernel does inside is its own
        try:
            result = kernel(*arguments, **named)
        finally:
            capture.inside.append(name)
        guarded(capture.taps[name], look)(capture, arguments, named, result)
        return result

    def look(capture: AttentionCapture, arguments: tuple, named: Mapping[str, Any], result: Any) -> None:
        values = (*arguments, *named.values())
        tensors = [x for x in values if isinstance(x, Tensor) and x.ndim == 4][:3]
        if len(tensors) < 3:
            raise ValueError(f"a watched kernel was given {len(tensors)} tensors of four axes, not q, k and v")
        o = result[0] if isinstance(result, tuple) else result
        given = next((named[key] for key in ("scale", "scaling", "softmax_scale") if named.get(key)), scale)
        call = AttentionCall(rounds_like or CUSTOM, window, given, torch.bfloat16 if rounds_like else multiplied_in(o))
        ends = [_heads_first if lies == "BTHD" else _same for lies in (layout, output_layout or layout)]
        capture.fill((*tensors, o), call, (ends[0], ends[0], ends[0], ends[1]))

    return watched  # type: ignore[return-value]
