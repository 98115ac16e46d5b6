"""Weight decay of a wrong size, on the wrong parameters, or inside Adam."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.double_update import SecondUpdate
from foreshock.faults.of_group import OfGroup, check_group
from foreshock.faults.operation import Training
from foreshock.faults.optimizer_update import Update
from foreshock.models.transformer import TransformerConfig, skeleton


@dataclass(frozen=True)
class WrongDecay(OfGroup):
    """The decay of a group times a factor; vectors: decays norms as matrices do; coupled: adds it to the gradient."""

    stackable: ClassVar[bool] = False

    factor: float
    vectors: bool
    coupled: bool

    @property
    def idle(self) -> bool:
        return self.factor == 1 and not self.vectors and not self.coupled

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        super().check_fits(model, train)
        if self.idle:
            return
        if train.weight_decay == 0:
            raise ValueError("fault: a wrong decay needs a decay, and the run has train.weight_decay=0")
        parameters = dict(skeleton(model).named_parameters())
        touched = [parameters[name] for name in self.touches(parameters)]
        matrices, vectors = (any((p.ndim >= 2) == of_matrices for p in touched) for of_matrices in (True, False))
        if not matrices and not self.vectors:
            raise ValueError(
                f"fault.group={self.group!r} has no effect with fault.vectors=false: it does not decay in health"
            )
        if not vectors and self.factor == 1 and not self.coupled:
            raise ValueError(
                f"fault.group={self.group!r} has no effect with fault.factor=1: it has no vectors, which alone would "
                "decay otherwise than in health"
            )

    def meets(self, other: Any) -> bool:
        # a second update would take a coupled decay or not, by the order of the two
        second = isinstance(other, SecondUpdate) and self.coupled and not self.idle
        return (isinstance(other, WrongDecay) or second) and self.overlaps(other)

    @contextmanager
    def around(self, update: Update) -> Iterator[None]:
        run = max(group["weight_decay"] for group in update.healthy)
        # another operation may have split a group, and the parts have its name and decay
        decays = [self._decay(group["name"], group["weight_decay"] > 0, run) for group in update.optimizer.param_groups]
        gradients = [p.grad for group in update.optimizer.param_groups for p in group["params"]]
        kept = [None if gradient is None else gradient.clone() for gradient in gradients] if self.coupled else []
        if self.coupled:
            for group, decay in zip(update.optimizer.param_groups, decays, strict=True):
                for parameter in group["params"] if decay is not None else ():
                    parameter.grad.add_(parameter, alpha=decay)
        changed = iter([0.0 if self.coupled and decay is not None else decay for decay in decays])

        def constants(group: dict[str, Any]) -> dict[str, Any]:
            decay = next(changed)
            return {} if decay is None else {"weight_decay": decay}

        update.set_constants(self, constants)
        yield
        for gradient, own in zip(gradients, kept, strict=False):
            if gradient is not None and own is not None:
                gradient.copy_(own)

    def _decay(self, group: str, matrices: bool, run: float) -> float | None:
        """The decay of one group of the optimizer, None where it keeps its own. run: the matrices' in health."""
        if self.group not in (None, group) or not (matrices or self.vectors):
            return None
        return self.factor * run


@dataclass(frozen=True)
class DecayWrong(OperationFault):
    """AdamW's weight decay times a factor, on norms too, or coupled with the gradient, at the steps of a window.

    What breaks: norms that a filter by class misses, so that they decay; or Adam with an L2 term in AdamW's place.
    Report: huggingface/transformers #35927.
    Equations (arXiv:1711.05101), with lambda = factor x the run's decay: decoupled, w <- w - lr lambda w beside Adam's
    update, as in health; coupled, g <- g + lambda w after the clip and before the moments, and no decoupled decay. In
    health matrices decay, embeddings among them, and vectors (norms) do not. Monitors see g without lambda w.

    factor: 0 or more; group: of ``PARAMETER_GROUPS``, or None for all; vectors: whether their vectors decay as well;
    factor 1 without both is the healthy control. Raises ValueError on impossible values, by name.
    """

    factor: float = 1.0
    group: str | None = None
    vectors: bool = False
    coupled: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.factor < math.inf:
            raise ValueError(f"fault.factor={self.factor} is not allowed: 0 or more, finite")
        check_group(self.group)
        super().__post_init__()

    @property
    def _operation(self) -> WrongDecay:
        return WrongDecay(self.group, self.factor, self.vectors, self.coupled)

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("optimizer", (self._operation,), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "optimizer", "group": self.group, "vectors": self.vectors}
        size = {"factor": self.factor, "coupled": self.coupled}
        return InjectionCard(self.family, (self.injection("decay", where, size, control=self._operation.idle),))
