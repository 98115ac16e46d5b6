"""What is seen of a training step from outside: the batch, taps, routings, and the gradient norm before the clip.

Hooks look and change nothing. What they raise is handed to ``failed`` and never reaches the training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foreshock.models.anatomies.model_taps import ModelTaps
from foreshock.models.anatomies.router_capture import RouterCapture
from foreshock.models.anatomies.watched_rows import WatchedRows, parameter_names
from foreshock.models.anatomy import Anatomy
from foreshock.models.batch import inputs_and_targets
from foreshock.models.moe import Routing
from foreshock.models.taps import NO_TAPS, Tap, Taps
from foreshock.models.transformer import Transformer

Hook = TypeVar("Hook", bound=Callable[..., Any])


def harmless(hook: Hook) -> Hook:
    """A method that training calls: an exception goes to ``self.failed`` in place of training."""

    @wraps(hook)
    def wrapper(self: Sight, *arguments: Any, **named: Any) -> Any:
        try:
            return hook(self, *arguments, **named)
        except Exception as error:
            self.failed(error)
            return None

    return cast(Hook, wrapper)


def taps_on(anatomy: Anatomy, places: Collection[str]) -> Taps:
    """Taps on our transformer or on another model."""
    if isinstance(anatomy.model, Transformer):
        return Taps(anatomy.model, places)
    return ModelTaps(anatomy, places)


class Compiled:
    """What a forward that ``torch.compile`` traces leaves behind: plain attributes alone."""

    def __init__(self) -> None:
        self.ran = False
        self.arguments: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}


class Sight:
    """The step in progress.

    wanted: called before a forward, which places to tap and whether routings are asked for; rows: of the batch to keep,
    None for all; scaler: whose scale gradients have; failed: takes what a hook raised.

    tokens: of all forwards that trained so far; update_tokens: of those since the last ``next_step``, None where the
    model is given none that are known;
    backwards, forwards: that hooks have seen since the last ``next_step``; grad_norm: of the last backward, 0-dim,
    before any clip; shared: whether that went through more than one forward; updated: whether the optimizer has
    stepped; taps, routings: of the last forward, empty where no one asked or they are not to be had; router_failure:
    what a router's hook raised, or None.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        optimizer: torch.optim.Optimizer,
        wanted: Callable[[], tuple[frozenset[str], bool]],
        rows: int | None,
        scaler: Any,
        failed: Callable[[Exception], None],
    ) -> None:
        self.anatomy, self.failed = anatomy, failed
        self._wanted, self._rows, self._scaler = wanted, rows, scaler
        self._parameters = [p for p in anatomy.model.parameters() if p.requires_grad]
        self._names = parameter_names(anatomy.model)
        self._handles: list[RemovableHandle] = []
        self._open: Taps | None = None
        self._routers: RouterCapture | None = None
        self._queued = self.apart = False
        self._earlier: list[ref[Tap]] = []
        self.compiled = Compiled()
        self.tokens = 0
        self.watched: WatchedRows | None = None
        self.next_step()
        self._install(anatomy.model, optimizer)

    def next_step(self) -> None:
        """Forget the step that has been read."""
        self.update_tokens: int | None = None
        self.backwards, self.forwards, self.updated, self.shared = 0, 0, False, False
        self._taken: dict[Tensor, int] = {}
        self.grad_norm: Tensor | None = None
        self.taps: Taps = NO_TAPS
        self.routings: tuple[Routing, ...] = ()
        self.router_failure: Exception | None = None

    def close(self) -> None:
        """Take every hook off."""
        self._end_taps()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _install(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        compiled = self.compiled

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():  # traced: this branch alone is in the graph
                compiled.ran, compiled.arguments, compiled.named = True, arguments, named
            else:
                self._before(arguments, named)

        def after(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if not torch.compiler.is_compiling():
                self._after(output)

        self._handles += [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
            optimizer.register_step_post_hook(lambda *_: self._stepped()),
        ]
        self._handles += [p.register_post_accumulate_grad_hook(self._arrived) for p in self._parameters]

    @harmless
    def _before(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.apart or not torch.is_grad_enabled():
            return
        if self._open is not None and "linear" in self._open.places:  # its graph keeps these alive, if it still counts
            self._earlier += [ref(tap) for tap in self._open.at("linear").values()]
        self._end_taps()
        self._queued = False
        self._keep(arguments, named)
        places, routed = self._wanted()
        if routed and not isinstance(self.anatomy.model, Transformer):
            self._routers = RouterCapture(self.anatomy).__enter__()
        if places:
            self._open = taps_on(self.anatomy, places).__enter__()

    def _keep(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.forwards += 1
        whole = WatchedRows.of(arguments, named, None, self.device, self._names)
        tokens = whole.tokens
        if tokens is not None:
            ours = isinstance(self.anatomy.model, Transformer)
            count = (inputs_and_targets(tokens)[1] if ours or tokens.ndim == 3 else tokens).numel()
            self.tokens += count
            self.update_tokens = (self.update_tokens or 0) + count
        self.watched = (
            whole if self._rows is None else WatchedRows.of(arguments, named, self._rows, self.device, self._names)
        )

    @harmless
    def _after(self, output: Any) -> None:
        if self.apart:
            return
        if isinstance(self._open, ModelTaps):
            self._open.end_forward()
        if self._routers is not None:
            self._routers.__exit__(None, None, None)
            self.routings, self.router_failure = self._routers.routings, self._routers.failure
            self._routers = None
        elif isinstance(self.anatomy.model, Transformer) and isinstance(output, tuple) and torch.is_grad_enabled():
            self.routings = output[2]

    @harmless
    def _arrived(self, _: Tensor) -> None:
        """A gradient has been added up, the first of a backward: ask to be called at its end."""
        if not self._queued and not self.apart:
            self._queued = True
            _at_end_of_backward(lambda: _at_end_of_backward(self._backward_ended))  # after all that others asked for

    @harmless
    @torch.no_grad()
    def _backward_ended(self) -> None:
        self._queued = False
        self.backwards += 1
        self.shared = any(tap is not None and tap.arrivals > 0 for tap in (each() for each in self._earlier))
        self._earlier.clear()
        if self.compiled.ran:
            self._keep(self.compiled.arguments, self.compiled.named)
            self.compiled.ran, self.compiled.arguments, self.compiled.named = False, (), {}
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        self.grad_norm = norm if self._scaler is None else norm / self._scaler.get_scale()
        if self._open is not None:
            self.taps = self._open
        self._end_taps()

    @harmless
    def _stepped(self) -> None:
        self.updated = True
        self._taken = {p: p.grad._version for p in self._parameters if p.grad is not None}

    def gradients_are_lost(self) -> bool:
        """Whether a gradient that the optimizer has taken is gone, or was written to since, as ``zero_grad`` does."""
        if not self._taken:
            return all(p.grad is None for p in self._parameters)
        return any(p.grad is None or p.grad._version != version for p, version in self._taken.items())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._parameters[0].device

    def _end_taps(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(None, None, None)
        if self._routers is not None:
            self._routers.__exit__(None, None, None)
            self._routers = None


def _at_end_of_backward(call: Callable[[], Any]) -> None:
    """Let autograd's engine call when the backward in progress has ended, after those that asked before."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(call)
