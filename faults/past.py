"""What a run keeps of its past for the operations that read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Reads = Mapping[tuple[str, int], tuple[int, frozenset[str]]]
"""By point and step, the last step that reads that step's tensors, and the names of those that it reads."""


class Past:
    """Copies of earlier tensors, each from the step that made it to the last step that reads it.

    At ``start`` it keeps the weights with which a step begins, at ``gradients`` what the backward pass computed, at
    ``weights`` what the update and its faults left.
    A run whose fault reads nothing of the past has an empty one, which is false.
    """

    def __init__(self, reads: Reads | None = None) -> None:
        self._reads = dict(reads or {})
        self._kept: dict[tuple[str, int], dict[str, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._reads)

    def keep(self, point: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy what later steps read of this step's tensors, and forget what no later step reads."""
        for key in [key for key in self._kept if self._reads[key][0] < step]:
            del self._kept[key]
        _, names = self._reads.get((point, step), (0, frozenset()))
        if names:
            self._kept[point, step] = {name: tensors[name].detach().clone() for name in tensors if name in names}

    def tensor(self, point: str, step: int, name: str) -> Tensor:
        """A tensor as it was at an earlier step. Raises KeyError where no operation declared that it reads it."""
        return self._kept[point, step][name]

    def state_dict(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {key: dict(tensors) for key, tensors in self._kept.items()}

    def load_state_dict(self, state: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
        self._kept = {key: dict(tensors) for key, tensors in state.items()}
