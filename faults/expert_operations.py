"""What can be wrong with experts: one is dead, or all take fewer tokens than they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from foreshock.models.corruption import Log, ModuleChange, Removable, hooks
from foreshock.models.moe import GroupedLinear, MoE, MoEConfig, Routing
from foreshock.models.transformer import TransformerConfig

KINDS = ("output", "gradient")


@dataclass(frozen=True)
class DeadExpert(ModuleChange):
    """One expert of one layer is dead: its output is zero, or the gradient of its weights.

    kind: of ``KINDS``; expert: an index, or None for none of them. Raises ValueError on impossible values, by name.
    """

    layer: int
    expert: int | None
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault.kind={self.kind!r} is not allowed: one of {', '.join(KINDS)}")
        for field, index in (("layer", self.layer), ("expert", self.expert)):
            if index is not None and index < 0:
                raise ValueError(f"fault.{field}={index} is not allowed: an index from 0")

    @property
    def idle(self) -> bool:
        return self.expert is None

    @property
    def changes_forward(self) -> bool:
        return not self.idle and self.kind == "output"

    @property
    def target(self) -> tuple[str, str]:
        return f"blocks.{self.layer}.mlp, expert {self.expert}", self.kind

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        if model.moe is None:
            raise ValueError(f"fault.expert={self.expert} has no effect on a dense model: choose model=moe_nano")
        for field, index, count in (
            ("layer", self.layer, model.n_layers),
            ("expert", self.expert, model.moe.n_experts),
        ):
            if index is not None and index >= count:
                raise ValueError(f"fault.{field}={index} does not fit the model: it has {count} {field}s")
        super().check_fits(model, train)

    def find(self, model: nn.Module) -> MoE:
        layer = dict(model.named_modules()).get(f"blocks.{self.layer}.mlp")
        if not isinstance(layer, MoE):
            raise ValueError(f"fault.layer={self.layer}: the model has no experts there")
        return layer

    def change(self, place: MoE, log: Log | None) -> Sequence[Removable]:
        if self.kind == "output":
            return hooks(place.output, "y", partial(self._without, log, "output y"))
        weights = {name: child for name, child in place.named_children() if isinstance(child, GroupedLinear)}
        return [
            handle
            for name, child in weights.items()
            for handle in hooks(child, "dw", partial(self._without, log, f"{name} dw"))
        ]

    def _without(self, log: Log | None, name: str, x: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
        """x with zeros where it is the expert's: slots (S, out), or weights (E, in, out)."""
        x = x.detach()
        if self.kind == "output":
            ends_E, slots = arguments[1], torch.arange(len(x), device=x.device)
            expert_of = torch.searchsorted(ends_E, slots.to(ends_E.dtype), right=True)
        else:
            expert_of = torch.arange(len(x), device=x.device)
        own = expert_of.eq(self.expert)  # type: ignore[arg-type]  # there is one
        dead = x.masked_fill(own.view(-1, *[1] * (x.ndim - 1)), 0.0)
        if log is not None:
            log.add("modules", self, f"blocks.{self.layer}.mlp.{name}", x, dead)
        return dead


@dataclass(frozen=True)
class CutCapacity(ModuleChange):
    """The capacity factor of every layer's experts times ``factor``, above 0, at most 1."""

    factor: float

    @property
    def idle(self) -> bool:
        return self.factor == 1

    @property
    def target(self) -> tuple[str, str]:
        return "experts", "capacity"

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        if model.moe is None or model.moe.capacity_factor is None:
            raise ValueError(
                f"fault.factor={self.factor} has no effect: the model has no experts with a capacity; "
                "choose model=moe_nano, or set model.moe.capacity_factor"
            )
        super().check_fits(model, train)

    def find(self, model: nn.Module) -> list[tuple[str, MoE]]:
        return [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]

    def change(self, place: list[tuple[str, MoE]], log: Log | None) -> Sequence[Removable]:
        handles: list[Removable] = []
        for name, layer in place:
            if log is not None:
                handles.append(layer.register_forward_hook(partial(self._count, log, name, layer.config)))
            handles.append(_OwnConfig(layer, layer.config))
            # the model is checked to have a capacity
            cut = self.factor * layer.config.capacity_factor  # type: ignore[operator]
            layer.config = replace(layer.config, capacity_factor=cut)
        return handles

    def _count(
        self, log: Log, name: str, healthy: MoEConfig, layer: MoE, _: Any, output: tuple[Tensor, Routing]
    ) -> None:
        """Log how many slots of each expert are dropped, and how many would be with the layer's own capacity."""
        routing = output[1]
        tokens = len(routing.logits_NE)
        before, after = (
            (routing.counts_E - config.capacity(tokens)).clamp(min=0)  # type: ignore[operator]  # there is one
            for config in (healthy, layer.config)
        )
        log.add("modules", self, f"{name} dropped", before, after)


@dataclass(frozen=True)
class _OwnConfig:
    """Gives a layer its own configuration back."""

    layer: MoE
    config: MoEConfig

    def remove(self) -> None:
        self.layer.config = self.config
