"""One update of an optimizer, as an operation on it sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foreshock.faults.operation import Moment, Operation
from foreshock.models.corruption import Log

CONSTANTS = ("betas", "eps", "weight_decay")
"""The keys of a parameter group that an operation may change for one update."""


@dataclass(frozen=True)
class Update:
    """The optimizer between the clip and its update, with the means to change it so that the change is logged.

    parameters: by name; log: where changes are counted, or None; healthy: the constants of every parameter group
    before any operation.
    """

    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    moment: Moment
    log: Log | None = None
    healthy: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        constants = [{key: group[key] for key in CONSTANTS} for group in self.optimizer.param_groups]
        object.__setattr__(self, "healthy", constants)

    def states(self, names: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each parameter's state by its name; none before an optimizer's first update, which makes them."""
        for name in names:
            state = self.optimizer.state.get(self.parameters[name])
            if state:
                yield name, state

    def write(self, operation: Any, name: str, key: str, value: Tensor) -> None:
        """Give one tensor of a parameter's state another value, in place."""
        before = self.optimizer.state[self.parameters[name]][key]
        if self.log is not None:
            self.log.add("optimizer", operation, f"{name} {key}", before, value)
        before.copy_(value)

    def set_constants(self, operation: Any, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Give every parameter group other values of ``CONSTANTS``. changed: from a group to its new values."""
        before = self._constants()
        for group in self.optimizer.param_groups:
            group.update(changed(group))
        if self.log is not None:
            self.log.add("optimizer", operation, "constants", before, self._constants())

    def _constants(self) -> Tensor:
        """beta_1, beta_2, epsilon and the decay of every parameter group, (groups, 4) in FP64."""
        rows = [[*group["betas"], group["eps"], group["weight_decay"]] for group in self.optimizer.param_groups]
        return torch.tensor(rows, dtype=torch.float64)


class OptimizerOperation(Operation, Protocol):
    """An operation on an optimizer's constants or state; its constants are restored after the update."""

    def around(self, update: Update) -> AbstractContextManager[None]:
        """A context that changes the optimizer before the update, after it, or both. The update is inside."""


@contextmanager
def corrupted_optimizer(update: Update, operations: Sequence[OptimizerOperation]) -> Iterator[None]:
    """Apply the operations of an update around it; the constants are as before once the context is closed."""
    try:
        with torch.no_grad(), ExitStack() as around:
            for operation in operations:
                if not operation.idle:
                    around.enter_context(operation.around(update))
            yield
    finally:
        for group, constants in zip(update.optimizer.param_groups, update.healthy, strict=True):
            group.update(constants)
