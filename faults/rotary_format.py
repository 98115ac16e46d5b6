"""Rotary phases computed in a lower format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from foreshock.faults.rounding import FORMATS, check_format
from foreshock.models.corruption import Log, ModuleChange, Removable
from foreshock.models.transformer import Rotary, TransformerConfig

ALLOWED = ("bf16", "fp16", "fp32")
"""Formats that have products of their own; the 8-bit ones have none."""


@dataclass(frozen=True)
class RotaryFormat(ModuleChange):
    """Position, frequency and their product in a format of ``ALLOWED``, in every layer; ``fp32`` changes nothing."""

    format: str

    def __post_init__(self) -> None:
        check_format(self.format, ALLOWED)

    @property
    def idle(self) -> bool:
        return self.format == "fp32"

    @property
    def target(self) -> tuple[str, str]:
        return "rotary embeddings", "phases"

    def check_fits(self, model: TransformerConfig, train: Any) -> None:
        if model.positions != "rope":
            raise ValueError(
                f"fault.format={self.format!r} has no effect on model.positions={model.positions!r}: "
                "set model.positions=rope"
            )
        super().check_fits(model, train)

    def find(self, model: nn.Module) -> list[tuple[str, Rotary]]:
        return [(name, module) for name, module in model.named_modules() if isinstance(module, Rotary)]

    def change(self, place: list[tuple[str, Rotary]], log: Log | None) -> Sequence[Removable]:
        handles = []
        for name, rotary in place:
            exact = rotary.cos, rotary.sin
            handles.append(_OwnTables(rotary, *exact))
            rotary.cos, rotary.sin = (table.to(exact[0].device) for table in rotary.tables(FORMATS[self.format]))
            for table, before in zip(("cos", "sin"), exact, strict=True) if log is not None else ():
                log.add("modules", self, f"{name}.{table}", before, getattr(rotary, table))  # type: ignore[union-attr]  # there is one
        return handles


@dataclass(frozen=True)
class _OwnTables:
    """Gives a rotary embedding its own tables back."""

    rotary: Rotary
    cos: Tensor
    sin: Tensor

    def remove(self) -> None:
        self.rotary.cos, self.rotary.sin = self.cos, self.sin
