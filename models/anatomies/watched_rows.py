"""The watched rows of a batch, as a model was called with them, and what training minimises on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from foreshock.models.trees import map_tensors

COUNT = "num_items_in_batch"
"""The argument by which a loss is divided by the tokens of a whole batch: of a few rows it is the mean without it."""

NO_TOKENS = ("mask", "position", "token_type")
"""In the names of whole-number arguments that are no tokens."""


class NoObjective(ValueError):
    """The model returns nothing that can be minimised."""


@dataclass(frozen=True)
class WatchedRows:
    """Arguments of one forward, tensors that lead with the batch cut to its last rows; not to be written.

    autocast: what the forward ran under, by device type: its dtype, or None where it was off; parameters: names of the
    forward's own, in order, where they are known.
    """

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    device: str
    autocast: torch.dtype | None
    parameters: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
        rows: int | None,
        device: torch.device,
        parameters: tuple[str, ...] = (),
    ) -> WatchedRows:
        """rows: how many, None for all."""
        own = {name: value for name, value in named.items() if name != COUNT}
        kept: tuple[tuple[Any, ...], Mapping[str, Any]] = (arguments, own)
        batch = len(next(iter(_tensors(kept)), torch.empty(0)))
        if rows is not None and rows < batch:
            kept = map_tensors(lambda x: x[-rows:] if x.ndim and len(x) == batch else x, kept)
        on = torch.is_autocast_enabled(device.type)
        return cls(*kept, device.type, torch.get_autocast_dtype(device.type) if on else None, parameters)

    @property
    def tokens(self) -> Tensor | None:
        """The token ids, (B, T), or inputs and targets apart, (B, 2, T) (``models.batch``); None without any.

        Masks and positions are no tokens; ``input_ids`` are, before others.
        """
        unnamed = map(str, range(len(self.parameters), len(self.arguments)))
        given = {**dict(zip((*self.parameters, *unnamed), self.arguments, strict=False)), **self.named}
        names = sorted(given, key=lambda name: name != "input_ids")
        trees = [given[name] for name in names if not any(other in name for other in NO_TOKENS)]
        found = [x for x in _tensors(trees) if x.dtype == torch.int64 and x.ndim == 2]
        if not found or "labels" in given or len(found) == 1 or found[1].shape != found[0].shape:
            return found[0] if found else None
        return torch.stack(found[:2], 1)

    def called(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Any:
        """What the model returns on these rows, with other weights or buffers in place of its own."""
        return torch.func.functional_call(model, dict(weights or {}), self.arguments, dict(self.named))

    def objective(self, output: Any, head: tuple[int, int] | None) -> Tensor:
        """What training minimises, from what the model returned: its loss, or next-token cross-entropy of its logits.

        head: rows and columns of the model's head, tokens and width, None without one. Without a head, a tensor that
        stands for itself is taken for hidden states; so is one of the model's width, or wider than the head's rows, of
        which a padded vocabulary may be cut off. Raises NoObjective for an output without loss and logits.
        """
        own = _get(output, "loss")
        parts = output if isinstance(output, tuple) else (output,)
        scalars = [x for x in parts if isinstance(x, Tensor) and x.ndim == 0 and x.is_floating_point()]
        if isinstance(own, Tensor):
            return own
        if scalars:
            return torch.stack([x.float() for x in scalars]).sum() if len(scalars) > 1 else scalars[0]
        named = _get(output, "logits")
        logits = parts[0] if named is None else named
        tokens = self.tokens
        if not isinstance(logits, Tensor) or logits.ndim != 3 or tokens is None or tokens.shape != logits.shape[:2]:
            raise NoObjective("the model returns no loss, and no logits (B, T, V) of its tokens (B, T)")
        if named is None and not _may_be_logits(logits.shape[-1], head):
            rows = "it has no head" if head is None else f"its head has {head[0]} rows"
            raise NoObjective(
                f"the model returns no loss, and {tuple(logits.shape)} may be hidden states and no logits: {rows}; "
                "return the loss, or an output with .logits"
            )
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _may_be_logits(width: int, head: tuple[int, int] | None) -> bool:
    """Whether a tensor of this last dimension can be what the head gives."""
    if head is None:
        return False
    rows, columns = head
    return width == rows or (width < rows and width != columns)


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Of a model's forward, in order; none where it does not say."""
    try:
        return tuple(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return ()


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _tensors(tree: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) if x.ndim else None, tree)
    yield from found


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """While it is open, modules run uncompiled, and what is drawn at random leaves training's generators alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        yield


def smooth_objective(
    model: nn.Module, rows: WatchedRows, head: tuple[int, int] | None, seed: int = 0
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The objective on these rows as a function of the weights by name, in their own precision, without autocast.

    head: of ``WatchedRows.objective``. Attention by ``scaled_dot_product_attention`` is the plain formula, twice
    differentiable; dropout draws alike.
    """

    def at(weights: Mapping[str, Tensor]) -> Tensor:
        device = next(iter(weights.values())).device
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with ExitStack() as stack:
            stack.enter_context(apart(device))
            torch.manual_seed(seed)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.autocast(device.type, enabled=False))
            return rows.objective(rows.called(model, {**weights, **buffers}), head)

    return at
