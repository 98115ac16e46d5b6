"""When a run ends before its last step."""

from __future__ import annotations

import torch
from torch import Tensor

from foreshock.experiments.training.train_config import TrainConfig


def drawup_limit(config: TrainConfig) -> float:
    """How far the label loss may stand above its lowest, in nats."""
    return torch.inf if config.stop_drawup_nats is None else config.stop_drawup_nats


def early_ends(limit: float | Tensor, finite: Tensor, held_out: Tensor, best: Tensor) -> list[str | None]:
    """For each run, why it ends at this evaluation, or None.

    limit: ``drawup_limit``; finite: whether its training losses all were; held_out, best: its label loss now and the
    lowest so far; each 0-dim, or one a run.
    """
    broken = (~(finite & torch.isfinite(held_out))).view(-1).tolist()
    above = (held_out - best >= limit).view(-1).tolist()
    return ["non_finite" if b else "diverged" if a else None for b, a in zip(broken, above, strict=True)]
