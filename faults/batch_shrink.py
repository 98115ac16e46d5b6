"""A global batch that shrinks: the second hyperparameter fault of arXiv:2606.28116."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from foreshock.faults.base import Sites, WindowedFault
from foreshock.faults.card import InjectionCard

LR_RULES = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}
"""Exponent of (new batch / healthy batch) on the learning rate."""


@dataclass(frozen=True)
class BatchShrink(WindowedFault):
    """Train on fewer sequences an update; they are the first of the healthy batch of the same seed and step.

    The loss stays a mean over the batch, so gradients keep their scale and gain noise.

    factor: share of the healthy batch, in (0, 1], rounded down; or batch_size: the new number of sequences;
    exactly one of them. lr_rule: ``none`` keeps the learning rate, ``linear`` and ``sqrt`` scale it by (new / healthy
    batch) to the power 1 and 1/2 (arXiv:1706.02677; arXiv:1404.5997). Raises ValueError on impossible values, by name.
    """

    factor: float | None = None
    batch_size: int | None = None
    lr_rule: str = "none"

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.batch_size is None):
            raise ValueError(
                f"fault.factor={self.factor} and fault.batch_size={self.batch_size}: give exactly one of them"
            )
        if self.factor is not None and not 0 < self.factor <= 1:
            raise ValueError(f"fault.factor={self.factor} is not allowed: above 0, at most 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"fault.batch_size={self.batch_size} is not allowed: at least 1 sequence")
        if self.lr_rule not in LR_RULES:
            raise ValueError(f"fault.lr_rule={self.lr_rule!r} is not allowed: one of {', '.join(LR_RULES)}")
        super().__post_init__()

    def shrunk(self, healthy: int) -> int:
        """Sequences in a faulty batch. Raises ValueError below one, or above the healthy batch."""
        if self.batch_size is not None:
            if self.batch_size > healthy:
                raise ValueError(f"fault.batch_size={self.batch_size} is above the healthy batch of {healthy}")
            return self.batch_size
        assert self.factor is not None  # exactly one of both is given
        size = math.floor(self.factor * healthy + 1e-9)  # 0.29 * 100 is 28.999... in floating point
        if size < 1:
            raise ValueError(f"fault.factor={self.factor} shrinks the batch of {healthy} below one sequence")
        return size

    def sites(self, step: int, healthy: Sites) -> Sites:
        if step not in self.window:
            return healthy
        size = self.shrunk(healthy.batch_size)
        scale = healthy.lr_scale.times((size / healthy.batch_size) ** LR_RULES[self.lr_rule])
        return replace(healthy, batch_size=size, lr_scale=scale)

    def describe(self) -> InjectionCard:
        size = {"factor": self.factor, "batch_size": self.batch_size}
        shrunk = self.injection("shrink", {"point": "batch_size"}, size, control=self.factor == 1)
        if LR_RULES[self.lr_rule] == 0:
            return InjectionCard(self.family, (shrunk,))
        exponent = {"exponent_of_batch": LR_RULES[self.lr_rule]}
        scaled = self.injection("scale", {"point": "lr_scale", "groups": None}, exponent, control=self.factor == 1)
        return InjectionCard(self.family, (shrunk, scaled))
