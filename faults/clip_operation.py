"""What may be wrong with the clip: its norm, and the tensors whose norm it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from foreshock.faults.operation import Operation, Training
from foreshock.models.transformer import TransformerConfig, parameter_group

SCOPES = ("model", "group", "tensor")
"""What is clipped by a norm of its own: all gradients together, each parameter group, or each tensor."""


@dataclass(frozen=True)
class ClipOperation(Operation):
    """The clip of one update. factor: on the clip's norm, None for no clip; scope: of ``SCOPES``."""

    stackable: ClassVar[bool] = False

    factor: float | None
    scope: str

    @property
    def idle(self) -> bool:
        return self.factor == 1 and self.scope == "model"

    def meets(self, other: Any) -> bool:
        return True

    def check_fits(self, model: TransformerConfig, train: Training) -> None:
        if train.clip is None and not self.idle:
            raise ValueError("fault: a wrong clip needs a clip, and the run has train.clip=null")

    def norm(self, clip: float) -> float | None:
        """The largest norm that it leaves, None for any. clip: the run's own."""
        return None if self.factor is None else self.factor * clip

    def parts(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The parameters that are clipped together, by a name for them."""
        parts: dict[str, list[str]] = {}
        for name in names:
            part = {"model": "model", "group": parameter_group(name), "tensor": name}[self.scope]
            parts.setdefault(part, []).append(name)
        return parts
