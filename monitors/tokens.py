"""Tokens of an update, which a training's settings promise to be the same each time."""

from __future__ import annotations

import torch

from foreshock.monitors.base import Needs, Reading, Signal, StepView
from foreshock.monitors.unreadable import Unreadable


class Tokens:
    """``tokens_per_update``: training tokens of the update, over all its micro-batches, of this process. Bad: both.

    Padding counts as the model is given it. A step whose batch has no tokens that are known is left out.
    """

    needs = Needs(view=("update_tokens",))

    def __init__(self, every_steps: int) -> None:
        self.signals = (
            Signal("tokens_per_update", "tokens/update", "both", every_steps=every_steps, family="optimization"),
        )

    def observe(self, view: StepView) -> dict[str, Reading]:
        if view.update_tokens is None:
            raise Unreadable("the model is given no token ids that are known")
        return {"tokens_per_update": torch.tensor(view.update_tokens, dtype=torch.float64, device=view.loss.device)}
