"""What each router of a model that is not ours did with a batch: its logits, and where tokens went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foreshock.models.anatomy import Anatomy
from foreshock.models.moe import Routing


class RouterCapture:
    """Looks at every router while it is open. A router returns its logits, (N, E), alone or first in a tuple.

    The experts that it chose are the whole numbers in that tuple, (N, K), or the ``top_k`` largest logits.
    failure: what a hook raised in place of looking, or None.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._routings: dict[str, Routing] = {}
        self._handles: list[RemovableHandle] = []
        self.failure: Exception | None = None

    @property
    def routings(self) -> tuple[Routing, ...]:
        """One a router, in the order of the blocks; empty where one of them has not run."""
        names = [part.module for part in self._anatomy.role("router")]
        return tuple(self._routings[name] for name in names) if self._routings.keys() >= set(names) else ()

    def __enter__(self) -> RouterCapture:
        try:
            self._set_hooks()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_hooks(self) -> None:
        for part in self._anatomy.role("router"):
            module = self._anatomy.model.get_submodule(part.module)
            self._handles.append(module.register_forward_hook(self._look(part.module)))

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _look(self, name: str) -> Callable[..., None]:
        config = self._anatomy.moe
        assert config is not None

        @torch.no_grad()
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            try:
                self._routings[name] = routing(output)
            except Exception as error:
                self.failure = error

        def routing(output: Any) -> Routing:
            returned = output if isinstance(output, tuple) else (output,)
            logits = returned[0].detach().flatten(0, -2).float()
            chosen = next((x for x in returned if isinstance(x, Tensor) and not x.is_floating_point()), None)
            if chosen is None:
                chosen = logits.topk(config.top_k, dim=-1).indices
            counts = torch.bincount(chosen.detach().flatten(), minlength=config.n_experts)
            return Routing(logits, logits.softmax(-1), counts, torch.zeros_like(counts[0]))

        return hook
