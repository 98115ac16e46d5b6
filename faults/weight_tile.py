"""A tile of a matrix that holds something else than its weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from foreshock.faults.card import InjectionCard
from foreshock.faults.corrupt import Corrupt, OperationFault
from foreshock.faults.operation import Moment, Operation, Training
from foreshock.models.transformer import TransformerConfig, skeleton

CONTENTS = ("zero", "noise", "stale")


@dataclass(frozen=True)
class Tile(Operation):
    """Neighbouring rows of a parameter, from a row drawn from seed and step, are replaced. content: of ``CONTENTS``."""

    stackable: ClassVar[bool] = False

    parameter: str
    rows: int
    content: str
    lag: int

    @property
    def idle(self) -> bool:
        return self.rows == 0

    @property
    def lookback_steps(self) -> int:
        return self.lag if self.content == "stale" else 0

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        rows = {name: len(weight) for name, weight in skeleton(model).named_parameters()}
        if self.parameter not in rows:
            near = ", ".join(difflib.get_close_matches(self.parameter, rows, n=4, cutoff=0.0))
            raise ValueError(
                f"fault.parameter={self.parameter!r} is not allowed: the model has no such parameter; the nearest are "
                f"{near}"
            )
        if self.rows > rows[self.parameter]:
            raise ValueError(f"fault.rows={self.rows} is not allowed: {self.parameter} has {rows[self.parameter]} rows")

    def touches(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name == self.parameter]

    def apply(self, x: Tensor, moment: Moment) -> Tensor:
        generator = moment.generator("weight_tile")
        first = int(generator.integers(len(x) - self.rows + 1))
        tile, changed = slice(first, first + self.rows), x.clone()
        if self.content == "zero":
            changed[tile] = 0.0
        elif self.content == "stale":
            changed[tile] = moment.earlier(self.lag)[tile]
        else:
            draws = generator.standard_normal(changed[tile].numel(), dtype=np.float32)
            size = torch.linalg.vector_norm(x[tile]) / x[tile].numel() ** 0.5
            changed[tile] = torch.from_numpy(draws).view(changed[tile].shape).to(x.device) * size
        return changed


@dataclass(frozen=True)
class WeightTile(OperationFault):
    """Neighbouring rows of a matrix are zero, noise or stale after the updates of a window, by default once.

    What breaks: a block of memory or a shard of a copy that is lost, garbled or not refreshed. Report:
    arXiv:2604.00726.
    Equation: W[r : r + rows] <- 0; or z s, with z standard normal and s the rows' own root mean square; or those rows
    as they stood ``lag`` updates ago. r is drawn uniformly, and z too, as pure functions of seed and step. Rows are
    whole; the optimizer's state stays right.

    parameter: a name of ``named_parameters()``; rows: 0 (the healthy control) or more; content: of ``CONTENTS``; lag:
    updates, at least 1, which the first faulty update must be late by. Raises ValueError on impossible values, by name.
    """

    parameter: str
    rows: int
    content: str = "zero"
    lag: int = 1

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"fault.rows={self.rows} is not allowed: 0 (the healthy control) or more")
        if self.content not in CONTENTS:
            raise ValueError(f"fault.content={self.content!r} is not allowed: one of {', '.join(CONTENTS)}")
        if self.lag < 1:
            raise ValueError(f"fault.lag={self.lag} is not allowed: at least 1 update")
        super().__post_init__()

    @cached_property
    def corrupt(self) -> Corrupt:
        return Corrupt("weights", (Tile(self.parameter, self.rows, self.content, self.lag),), self.window)

    def describe(self) -> InjectionCard:
        where = {"point": "weights", "parameter": self.parameter}
        size = {"rows": self.rows, "lag": self.lag if self.content == "stale" else None}
        return InjectionCard(self.family, (self.injection(self.content, where, size, control=self.rows == 0),))
