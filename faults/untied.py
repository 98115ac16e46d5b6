"""Tied matrices that come apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.tied_matrix import USERS, StaleCopy, check_user


@dataclass(frozen=True)
class Untied(OperationFault):
    """One copy of the tied matrix stops following the other, at the steps of a window.

    What breaks: sharding or a load makes two tensors of one, and the optimizer knows only one of them. Reports: NeMo RL
    #227, where ties were not kept, and paiml/entrenar #314.
    Equation: with W_0 the matrix before the first faulty update, the stale copy computes with W_0, in training and in
    the held-out loss: y = x W_0^T of the head, W_0[token] of the embedding. Its share of the gradient is that of W_0, a
    tensor that no optimizer has, and is lost: dW is the other share alone, and so are clip and moments. After the
    window the copy follows again, and in a later period it has the same W_0. W_0 is in the checkpoint. Not modelled:
    two copies that both learn, each from its own share, as in paiml/entrenar #314.

    stale_copy: ``head`` or ``embedding``, or None, the healthy control. Raises ValueError for another, and for a model
    whose head has a matrix of its own.
    """

    stale_copy: str | None = "head"

    def __post_init__(self) -> None:
        check_user("stale_copy", self.stale_copy, None)
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("modules", (StaleCopy(self.stale_copy, self.window.first),), self.window)

    def describe(self) -> InjectionCard:
        where = {
            "point": "modules",
            "modules": (USERS[self.stale_copy],) if self.stale_copy else (),
            "tensor": "weight",
        }
        injection = self.injection("stale", where, {"stale_copy": self.stale_copy}, control=self.stale_copy is None)
        return InjectionCard(self.family, (injection,))
