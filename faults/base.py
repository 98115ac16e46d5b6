"""What a fault may touch in one step, and what a fault is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from models.corruption import ModuleFault
from models.numerics import HEALTHY, AttentionNumerics
from models.transformer import PARAMETER_GROUPS


@dataclass(frozen=True)
class LearningRateScale:
    """Factor on the scheduled learning rate of each parameter group (``models.transformer.PARAMETER_GROUPS``)."""

    embedding: float = 1.0
    attention: float = 1.0
    mlp: float = 1.0
    router: float = 1.0
    norm: float = 1.0

    def times(self, factor: float, groups: tuple[str, ...] = PARAMETER_GROUPS) -> LearningRateScale:
        """These factors with those of ``groups`` (default: all) multiplied by ``factor``."""
        return replace(self, **{group: getattr(self, group) * factor for group in groups})


@dataclass(frozen=True)
class Sites:
    """Everything that a fault may touch in one step. The defaults are a healthy step.

    batch_size: sequences in this step's batch; numerics: which BF16 operation is done to which attention
    tensor; modules: the same outside attention; lr_scale: factors on the scheduled learning rate; balance_scale:
    factor on what keeps the loads of experts even, the load-balance loss's coefficient and the balancing bias's step.
    """

    batch_size: int
    numerics: AttentionNumerics = HEALTHY
    modules: tuple[ModuleFault, ...] = ()
    lr_scale: LearningRateScale = field(default_factory=LearningRateScale)
    balance_scale: float = 1.0


@runtime_checkable
class Fault(Protocol):
    """A frozen dataclass whose fields are the keys of ``conf/fault/<name>.yaml``.

    ``sites`` is pure: the same step and healthy sites always give the same answer. Outside its
    window it returns the very object ``healthy``, so that "healthy before onset" is an equality.
    ``step`` counts optimizer updates from 0: the update of an onset-0 fault is the run's first.
    """

    onset: int | None

    def sites(self, step: int, healthy: Sites) -> Sites: ...


@dataclass(frozen=True)
class Window:
    """The steps ``onset <= step < onset + duration``; duration None = to the end."""

    onset: int = 0
    duration: int | None = None

    def __post_init__(self) -> None:
        if self.onset < 0:
            raise ValueError(f"fault.onset={self.onset} is not allowed: a step from 0")
        if self.duration is not None and self.duration < 1:
            raise ValueError(f"fault.duration={self.duration} is not allowed: at least 1 step, or null for no end")

    def __contains__(self, step: int) -> bool:
        return step >= self.onset and (self.duration is None or step < self.onset + self.duration)
