"""Earlier weights of stacked runs: copied once for all of them, and read run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from foreshock.models.trees import stack_trees
from foreshock.monitors.base import WeightHistory


class SliceHistory(WeightHistory):
    """What slice ``index`` of a stacked model's history shows; the stacked one records."""

    def __init__(self, stacked: WeightHistory, index: int) -> None:
        super().__init__(())
        self._stacked, self._index = stacked, index

    def at(self, step: int) -> Mapping[str, Tensor] | None:
        weights = self._stacked.at(step)
        return None if weights is None else {name: weight[self._index] for name, weight in weights.items()}

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        return {step: dict(self.at(step) or {}) for step in self._stacked.state_dict()}


def load_history(stacked: WeightHistory, states: Sequence[Mapping[int, Mapping[str, Tensor]]]) -> None:
    """Give a stacked history what its slices saved at one and the same step."""
    stacked.load_state_dict(stack_trees(states))
