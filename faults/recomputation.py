"""Activation checkpointing of blocks, whose second forward may draw other masks of dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from foreshock.faults.layers import Layers, check_layers, check_layers_fit, share_a_layer
from foreshock.models.corruption import Log, ModuleChange, Removable
from foreshock.models.dropout import Dropout, dropping
from foreshock.models.recomputing import recomputed, recomputing
from foreshock.models.transformer import Block, TransformerConfig


@dataclass(frozen=True)
class Recomputation(ModuleChange):
    """Blocks keep their input alone and compute the rest again in the backward, by ``torch.utils.checkpoint``.

    layers: indices, or None for all; same: whether the second forward draws the masks of the first.
    Raises ValueError on impossible layers, by name.
    """

    layers: Layers
    same: bool

    def __post_init__(self) -> None:
        check_layers(self.layers)

    @property
    def idle(self) -> bool:
        return False  # with the same masks too, it really computes again

    @property
    def changes_forward(self) -> bool:
        return False  # only a backward computes again, and an evaluation has no dropout

    @property
    def target(self) -> tuple[str, str]:
        return "blocks", "recomputation"

    def meets(self, other: ModuleChange) -> bool:
        return isinstance(other, Recomputation) and share_a_layer(self.layers, other.layers)

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        if not model.dropout:
            raise ValueError("fault: model.dropout=0.0 leaves no mask to draw again: set it above 0, such as 0.1")
        check_layers_fit(self.layers, model.n_layers)
        super().check_fits(model, train)

    def find(self, model: nn.Module) -> list[tuple[str, Block]]:
        blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]
        return blocks if self.layers is None else [blocks[layer] for layer in self.layers]

    def change(self, place: list[tuple[str, Block]], log: Log | None) -> Sequence[Removable]:
        handles: list[Removable] = []
        for name, block in place:
            block.forward = partial(self._forward, block)  # type: ignore[method-assign]  # in front of the class's own
            handles.append(_OwnForward(block))
            for part, module in block.named_children():
                if isinstance(module, Dropout) and log is not None and not self.same:
                    handles.append(module.register_forward_hook(partial(self._count, log, f"{name}.{part} mask")))
        return handles

    def _forward(self, block: Block, *arguments: Any) -> Any:
        forward = partial(type(block).forward, block)
        if not torch.is_grad_enabled():
            return forward(*arguments)
        # no generator of PyTorch's own is read; a second forward that stopped early would leave modules' hooks undone
        with set_checkpoint_early_stop(False):
            return checkpoint(
                forward,
                *arguments,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(self._contexts, block),
            )

    def _contexts(self, block: Block) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Those of the first forward and of the second."""
        return nullcontext(), self._second(block)

    @contextmanager
    def _second(self, block: Block) -> Iterator[None]:
        draw = next(module.draw for module in block.modules() if isinstance(module, Dropout))
        if draw is None:
            raise ValueError(f"{self}: the backward runs outside of the context in which masks are drawn")
        with recomputed(), dropping(block, replace(draw, again=not self.same)):
            yield

    def _count(self, log: Log, name: str, module: Dropout, arguments: tuple[Tensor], output: Tensor) -> None:
        """Log in which elements the two masks differ."""
        if recomputing() and module.draw is not None and log.wants("modules", self, name):
            x, first = arguments[0], replace(module.draw, again=False)
            log.add("modules", self, name, module.kept(x, first), module.kept(x, module.draw))


@dataclass(frozen=True)
class _OwnForward:
    """Gives a block its class's forward back."""

    block: Block

    def remove(self) -> None:
        self.block.__dict__.pop("forward", None)
