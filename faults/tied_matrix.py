"""What can be wrong with a matrix that head and embedding share: one share of its gradient, or one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from foreshock.models.corruption import (
    Log,
    ModuleChange,
    OwnWeight,
    Remembered,
    Removable,
    TensorChange,
    own_weight_again,
)
from foreshock.models.transformer import TransformerConfig

USERS = {"head": "head", "embedding": "tokens"}
"""By what a fault calls it, the module that multiplies by the tied matrix, or reads its rows."""
MATRIX = "tokens.weight"
"""The name of the tied matrix among a model's parameters."""


def check_user(field: str, value: str | None, *others: None) -> None:
    """Raise ValueError where a field of a fault is none of ``USERS`` and none of ``others``."""
    if value not in (*USERS, *others):
        or_none = ", or null for none" if others else ""
        raise ValueError(f"fault.{field}={value!r} is not allowed: one of {', '.join(USERS)}{or_none}")


def check_tied(model: TransformerConfig) -> None:
    """Raise ValueError for a model whose head has a matrix of its own."""
    if not model.tie_embeddings:
        raise ValueError("fault: it needs a head that is tied to the embedding: set model.tie_embeddings=true")


@dataclass(frozen=True)
class ScaledShare(TensorChange):
    """What one of ``USERS`` adds to the gradient of the tied matrix, times a factor. module: its module's name."""

    factor: float

    @property
    def idle(self) -> bool:
        return self.factor == 1

    @staticmethod
    def has_place(name: str, module: nn.Module) -> bool:
        return name in USERS.values()

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        check_tied(model)
        super().check_fits(model, train)

    def corrupt(self, x: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> Tensor:
        return x.detach() * self.factor


@dataclass(frozen=True)
class StaleCopy(ModuleChange):
    """One of ``USERS`` has the tied matrix as it was when step ``since`` began, and hands no gradient on to it.

    copy: of ``USERS``, or None for none.
    """

    copy: str | None
    since: int

    @property
    def idle(self) -> bool:
        return self.copy is None

    @property
    def target(self) -> tuple[str, str]:
        return USERS.get(self.copy or "", "no module"), "weight"

    def meets(self, other: ModuleChange) -> bool:
        """What is done to a gradient that is lost has no effect, and two copies would leave no matrix that learns."""
        if self.idle:
            return False
        if isinstance(other, StaleCopy):
            return not other.idle
        module, site = other.target
        return module == self.target[0] and site in ("weight", "dw")

    @property
    def reads(self) -> tuple[int, str]:
        return self.since, MATRIX

    def remembering(self, past: Remembered) -> ModuleChange:
        return self if self.idle else _Remembered(self, past.tensor("start", self.since, MATRIX))

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        check_tied(model)
        super().check_fits(model, train)

    def find(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.target[0]) if self.copy else model

    def change(self, place: nn.Module, log: Log | None) -> Sequence[Removable]:
        raise ValueError(f"{self} is applied to a model once its matrix is remembered")


@dataclass(frozen=True, eq=False)
class _Remembered(ModuleChange):
    """A stale copy with its matrix, (V, E)."""

    of: StaleCopy
    matrix: Tensor

    @property
    def idle(self) -> bool:
        return False

    @property
    def target(self) -> tuple[str, str]:
        return self.of.target

    def meets(self, other: ModuleChange) -> bool:
        return self.of.meets(other)

    def find(self, model: nn.Module) -> nn.Module:
        return self.of.find(model)

    def change(self, place: nn.Module, log: Log | None) -> Sequence[Removable]:
        before = place.register_forward_pre_hook(lambda module, _: self._lay_over(module, log))
        after = place.register_forward_hook(lambda module, *_: own_weight_again(module))
        return [before, after, OwnWeight(place)]

    def _lay_over(self, module: nn.Module, log: Log | None) -> None:
        """Let this forward find the copy in the place of the parameter; its gradient stays with it."""
        copy = self.matrix.detach().requires_grad_(torch.is_grad_enabled())
        if log is not None:
            name = self.target[0]
            log.add("modules", self.of, f"{name} weight", module.weight.detach(), copy.detach())  # type: ignore[operator]  # a tensor
            copy.register_hook(lambda dw: log.add("modules", self.of, f"{name} dw", dw, torch.zeros_like(dw)))
        module.__dict__["weight"] = copy
