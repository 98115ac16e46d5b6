"""What is done at one point of a training step, as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from foreshock.faults.past import Past
from foreshock.models.corruption import Log
from foreshock.models.transformer import TransformerConfig


class Training(Protocol):
    """The settings of a training that a fault is checked against (``experiments.training.train_config``)."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def clip(self) -> float | None: ...
    @property
    def compile(self) -> bool: ...
    @property
    def micro_batch(self) -> int | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def watched_sequences(self) -> int | None: ...
    @property
    def weight_decay(self) -> float: ...


class SiteValue(Protocol):
    """A value at one point of the step: a frozen dataclass, so that it compares, hashes and prints.

    stackable: whether a run of a stack can have it.
    """

    stackable: ClassVar[bool] = True

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        """Raise ValueError that names the field where the model or the training cannot have it."""
        return


class Operation(SiteValue, Protocol):
    """What is done at one point of the step, one of a tuple that is applied in order."""

    @property
    def lookback_steps(self) -> int:
        """How many steps ago its tensors are that it reads, 0 for none of the past (``faults.past``)."""
        return 0

    @property
    def idle(self) -> bool:
        """Whether it changes nothing by its own parameters; whoever applies operations leaves it out."""
        return False

    @property
    def changes_forward(self) -> bool:
        """Whether the same weights give another loss than without it, as of a number format."""
        return False

    def meets(self, other: Any) -> bool:
        """Whether both would set one value, which no order of the two makes right."""
        return False


@dataclass(frozen=True)
class Moment:
    """All that an operation may depend on beside its tensor.

    seed: of the run; step: from 0; vocab_size: tokens; past: what the run keeps of earlier steps; point, tensor: the
    field of ``Sites`` and the tensor's name, where an operation is applied to one.
    """

    seed: int
    step: int
    vocab_size: int
    past: Past = field(default_factory=Past)
    point: str = ""
    tensor: str = ""

    def at(self, point: str, tensor: str) -> Moment:
        """The same for one tensor."""
        return replace(self, point=point, tensor=tensor)

    def earlier(self, steps: int) -> Tensor:
        """The tensor as it was so many steps ago, which a lookback must have declared."""
        return self.past.tensor(self.point, self.step - steps, self.tensor)

    def generator(self, purpose: str) -> np.random.Generator:
        """A generator that is a pure function of seed, step and purpose; no two purposes share their draws."""
        return np.random.Generator(np.random.PCG64((self.seed, self.step, *purpose.encode())))


@dataclass(frozen=True)
class Places:
    """Where a sequence of the training corpus can begin: at tokens 0 to ``count`` - 1, in the order of its files.

    context_length: tokens that a model reads at once.
    """

    count: int
    context_length: int


class SystemOperation(Operation, Protocol):
    """What becomes of the things around the step: the read of the batch, the checkpoint, the readings.

    No weight depends on it. All runs of a stack share them, so that a run with such an operation trains by itself.
    """

    stackable: ClassVar[bool] = False

    def wait(self, log: Log | None) -> None:
        """Wait before the batch is read; by default not at all."""
        return


class SamplingOperation(Operation, Protocol):
    """An operation on where in the corpus the sequences of a batch begin, before they are read."""

    def apply(self, starts_B: np.ndarray, places: Places, moment: Moment) -> np.ndarray:
        """The changed starts, int64, (B,); those given stay as they are."""


class BatchOperation(Operation, Protocol):
    """An operation on the token ids of a batch. changes: which of them.

    A stack has its inputs and targets in one tensor, so that a run with such an operation trains by itself.
    """

    stackable: ClassVar[bool] = False
    changes: ClassVar[tuple[str, ...]] = ("inputs", "targets")

    def apply(self, pair_B2T: Tensor, moment: Moment) -> Tensor:
        """The changed inputs and targets, int64, (B, 2, T), in that order; those given stay as they are.

        A target that is ``models.batch.IGNORED`` stays so, whatever stands there (``faults.points.corrupt_batch``).
        """


class TensorOperation(Operation, Protocol):
    """An operation on named tensors: gradients or weights."""

    def touches(self, names: Iterable[str]) -> list[str]:
        """Those of the names whose tensors it changes."""

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        """The changed tensor, of the shape and dtype of x, which stays as it is."""
