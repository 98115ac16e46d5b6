"""When a run diverged, judged from its held-out loss alone. Evaluations are rows, runs are columns.

The label is the same for every fault: the loss on a fixed held-out batch, since the training loss of a
shrunk batch rises by noise alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def smoothed(loss: np.ndarray, ema_span: int = 5) -> np.ndarray:
    """EMA of span ``ema_span`` evaluations, weight 2 / (span + 1), started at the first value. (N,) -> (N,)."""
    return pd.Series(np.asarray(loss, float)).ewm(span=ema_span, adjust=False).mean().to_numpy()


def drawup(loss: np.ndarray, ema_span: int = 5) -> np.ndarray:
    """D(t) = l(t) - min_(s <= t) l(s) of the smoothed loss l, in its unit. (N,) -> (N,), zero or more."""
    smooth = smoothed(loss, ema_span)
    return smooth - np.fmin.accumulate(smooth)


def drawup_threshold(
    healthy_losses: Sequence[np.ndarray],
    *,
    ema_span: int = 5,
    min_drawup_nats: float = 0.10,
    healthy_factor: float = 1.5,
) -> float:
    """Delta = max(min_drawup_nats, healthy_factor x the largest drawup of any reference run), in nats.

    Raises ValueError without reference runs or where one of them has a non-finite loss.
    """
    if not len(healthy_losses):
        raise ValueError("a divergence threshold needs at least one healthy reference run, got none")
    if not all(np.all(np.isfinite(loss)) for loss in healthy_losses):
        raise ValueError("a healthy reference run has a non-finite loss: it cannot set the divergence threshold")
    largest = max(float(np.max(drawup(loss, ema_span))) for loss in healthy_losses)
    return max(min_drawup_nats, healthy_factor * largest)


def divergence_step(
    loss: np.ndarray,
    *,
    healthy_losses: Sequence[np.ndarray],
    steps: np.ndarray,
    ema_span: int = 5,
    min_drawup_nats: float = 0.10,
    healthy_factor: float = 1.5,
    consecutive: int = 5,
) -> int | None:
    """The step at which a run diverged, or None.

    It is the start of the first excursion in which the drawup stays at or above ``drawup_threshold``
    for ``consecutive`` evaluations, or the first evaluation with a non-finite loss, whichever is earlier.

    loss: (N,) held-out losses in nats; steps: (N,) their steps, increasing; healthy_losses: those of the
    reference runs at the same horizon. Raises ValueError where the shapes or the order do not fit.
    """
    loss, steps = np.asarray(loss, float), np.asarray(steps)
    if loss.shape != steps.shape or loss.ndim != 1:
        raise ValueError(f"loss has shape {loss.shape} and steps {steps.shape}: both (N,)")
    if np.any(np.diff(steps) <= 0):
        raise ValueError("steps must increase: they are unsorted or repeated")
    broken = np.flatnonzero(~np.isfinite(loss))
    end = broken[0] if len(broken) else len(loss)
    threshold = drawup_threshold(
        healthy_losses, ema_span=ema_span, min_drawup_nats=min_drawup_nats, healthy_factor=healthy_factor
    )
    above = drawup(loss[:end], ema_span) >= threshold
    excursion = np.lib.stride_tricks.sliding_window_view(above, consecutive).all(1) if end >= consecutive else above[:0]
    starts = np.flatnonzero(excursion)
    if len(starts):
        return int(steps[starts[0]])
    return int(steps[end]) if len(broken) else None


def is_degraded(loss: np.ndarray, calibration_losses: Sequence[np.ndarray], ema_span: int = 5) -> bool:
    """Whether a run ends above the largest final smoothed loss of the calibration runs. For runs that never diverge."""
    finals = [smoothed(healthy, ema_span)[-1] for healthy in calibration_losses]
    return bool(smoothed(loss, ema_span)[-1] > max(finals))
