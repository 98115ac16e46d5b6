"""The largest magnitudes that tensors had in earlier updates, from which delayed scales of FP8 are made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class AmaxHistory:
    """The state of delayed scaling between two updates, by the name of a tensor: amaxes of updates, the newest last.

    An update counts where something was noted in it: those in which no recipe was at work leave no gap.
    """

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}
        self._now: dict[str, tuple[Tensor, int]] = {}

    def note(self, name: str, amax: Tensor, keep: int) -> None:
        """Take an amax of the update under way, 0-dim: of several, as of micro-batches, the largest counts.

        keep: of how many updates amaxes are needed.
        """
        before = self._now.get(name)
        self._now[name] = (amax if before is None else torch.maximum(before[0], amax)), keep

    def end_update(self) -> None:
        """Add what was noted to the updates that are known, and forget what is too old."""
        for name, (amax, keep) in self._now.items():
            known = self._known.get(name, amax.new_empty(0))
            self._known[name] = torch.cat((known, amax[None]))[-keep:]
        self._now.clear()

    def largest(self, name: str, updates: int, lag: int = 0) -> Tensor | None:
        """The largest amax of so many updates that ended before this one, but for the last ``lag`` of them, 0-dim.

        The oldest known where all of them are among those last; None where none is known.
        """
        known = self._known.get(name)
        if known is None:
            return None
        return known[: max(1, len(known) - lag)][-updates:].amax()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._known)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._known = dict(state)
