"""When a run diverged, judged from its losses alone.

The label is the same for every fault: the loss on a fixed held-out batch, since the training loss of a
shrunk batch rises by noise alone; through healthy kernels, since a mask that leaks makes its own loss look good.
Other rules that are in use, on the training loss, are here to see whether a ranking depends on the label; none of them
is ever shown to a detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from foreshock.experiments.trace import Series, Trace

LABEL_SIGNAL, CLEAN_SIGNAL = "held_out_loss", "held_out_loss.clean"
"""The held-out loss through a run's own kernels and, where its fault changes the forward, through healthy ones."""

OTHER_LABELS = ("delta x0.5", "delta x2", "training loss", "OLMo", "LLM-Foundry")


def smoothed(loss: np.ndarray, ema_span: int = 5) -> np.ndarray:
    """EMA of span ``ema_span`` evaluations, weight 2 / (span + 1), started at the first value. (N,) -> (N,)."""
    return pd.Series(np.asarray(loss, float)).ewm(span=ema_span, adjust=False).mean().to_numpy()


def drawup(loss: np.ndarray, ema_span: int = 5) -> np.ndarray:
    """D(t) = l(t) - min_(s <= t) l(s) of the smoothed loss l, in its unit. (N,) -> (N,), zero or more."""
    smooth = smoothed(loss, ema_span)
    return smooth - np.fmin.accumulate(smooth)


def clean_label(run: Trace) -> Series:
    """The loss that a run is judged by: through healthy kernels where there is one, else its own.

    Where the own loss is not finite, that stands in its place: the run is broken, whatever its weights are worth.
    """
    own = run.signals[LABEL_SIGNAL]
    if CLEAN_SIGNAL not in run.signals:
        return own
    clean = run.signals[CLEAN_SIGNAL]
    return replace(clean, values=np.where(np.isfinite(own.values), clean.values, own.values))


@dataclass(frozen=True)
class DrawupLabel:
    """What counts as a divergence: the keys of ``conf/label``.

    ema_span: of the smoothing, in evaluations; min_drawup_nats: the least drawup; healthy_factor: the least one in
    largest drawups of reference runs; consecutive: evaluations that it lasts.
    """

    ema_span: int = 5
    min_drawup_nats: float = 0.10
    healthy_factor: float = 1.5
    consecutive: int = 5


PRIMARY = DrawupLabel()


def drawup_threshold(healthy_losses: Sequence[np.ndarray], label: DrawupLabel = PRIMARY) -> float:
    """Delta = max(min_drawup_nats, healthy_factor x the largest drawup of any reference run), in nats.

    Raises ValueError without reference runs or where one of them has a non-finite loss.
    """
    losses = tuple(np.asarray(loss, float).tobytes() for loss in healthy_losses)
    return max(label.min_drawup_nats, label.healthy_factor * _largest_drawup(losses, label.ema_span))


@lru_cache(maxsize=16)
def _largest_drawup(healthy_losses: tuple[bytes, ...], ema_span: int) -> float:
    """Of any run; the same reference runs judge every run of an experiment."""
    losses = [np.frombuffer(loss) for loss in healthy_losses]
    if not losses:
        raise ValueError("a divergence threshold needs at least one healthy reference run, got none")
    if not all(np.all(np.isfinite(loss)) for loss in losses):
        raise ValueError("a healthy reference run has a non-finite loss: it cannot set the divergence threshold")
    return max(float(np.max(drawup(loss, ema_span))) for loss in losses)


def divergence_step(
    loss: np.ndarray,
    *,
    healthy_losses: Sequence[np.ndarray],
    steps: np.ndarray,
    label: DrawupLabel = PRIMARY,
    delta_scale: float = 1.0,
    stopped: bool = False,
) -> int | None:
    """The step at which a run diverged, or None.

    It is the start of the first excursion in which the drawup stays at or above ``delta_scale`` x
    ``drawup_threshold`` for ``consecutive`` evaluations, or the first evaluation with a non-finite loss, whichever
    is earlier. A run that its trainer ``stopped`` as diverged may end within its excursion, however short.

    loss: (N,) held-out losses in nats; steps: (N,) their steps, increasing; healthy_losses: those of the
    reference runs at the same horizon. Raises ValueError where the shapes or the order do not fit.
    """
    loss, steps = _checked(loss, steps)
    broken = np.flatnonzero(~np.isfinite(loss))
    end = broken[0] if len(broken) else len(loss)
    above = drawup(loss[:end], label.ema_span) >= delta_scale * drawup_threshold(healthy_losses, label)
    start = first_streak(above, label.consecutive, cut_short=stopped and not len(broken))
    if start is not None:
        return int(steps[start])
    return int(steps[end]) if len(broken) else None


def _checked(loss: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loss, steps = np.asarray(loss, float), np.asarray(steps)
    if loss.shape != steps.shape or loss.ndim != 1:
        raise ValueError(f"loss has shape {loss.shape} and steps {steps.shape}: both (N,)")
    if np.any(np.diff(steps) <= 0):
        raise ValueError("steps must increase: they are unsorted or repeated")
    return loss, steps


def first_streak(above: np.ndarray, length: int, cut_short: bool = False) -> int | None:
    """Where the first streak of at least ``length`` begins; ``cut_short``: a shorter one at the very end counts too."""
    edges = np.diff(np.concatenate(([False], above, [False])).astype(int))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    long = ends - starts >= length
    if cut_short:
        long |= ends == len(above)
    return int(starts[long][0]) if long.any() else None


def rolling_sigma_step(
    loss: np.ndarray, *, steps: np.ndarray, window: int = 1000, sigmas: float = 7.0, min_history: int = 100
) -> int | None:
    """First step with a loss more than ``sigmas`` deviations above the mean of the ``window`` steps before it.

    OLMo's spike rule (arXiv:2501.00656 section 3.1), one-sided; from ``min_history`` steps on. Non-finite counts.
    """
    loss, steps = _checked(loss, steps)
    before = pd.Series(loss).shift(1).rolling(window, min_periods=min_history)
    mean = before.mean()
    resolution = window * np.finfo(float).eps * mean.abs()  # equal losses have a mean that rounding moves a little
    return _first(steps, (loss > mean + resolution + sigmas * before.std()) | ~np.isfinite(loss))


def running_mean_step(
    loss: np.ndarray, *, steps: np.ndarray, window: int = 100, factor: float = 2.0, consecutive: int = 5
) -> int | None:
    """Start of the first ``consecutive`` steps with a loss of at least ``factor`` x the mean of ``window`` before.

    LLM-Foundry's rule for stopping a run (``KillLossSpike``). Non-finite counts at once.
    """
    loss, steps = _checked(loss, steps)
    mean = pd.Series(loss).shift(1).rolling(window, min_periods=window).mean().to_numpy()
    start = first_streak(loss >= factor * mean, consecutive)
    broken = _first(steps, ~np.isfinite(loss))
    candidates = [step for step in (None if start is None else int(steps[start]), broken) if step is not None]
    return min(candidates, default=None)


def _first(steps: np.ndarray, where: np.ndarray) -> int | None:
    hits = np.flatnonzero(where)
    return int(steps[hits[0]]) if len(hits) else None


def sensitivity_labels(
    held_out: tuple[np.ndarray, np.ndarray],
    training: tuple[np.ndarray, np.ndarray],
    *,
    healthy_held_out: Sequence[np.ndarray],
    healthy_training: Sequence[np.ndarray],
    label: DrawupLabel,
    stopped: bool = False,
) -> dict[str, int | None]:
    """Divergence by every other label: Delta x 0.5 and x 2, the training loss, OLMo's and LLM-Foundry's rules.

    held_out, training: (steps, loss) of the run; healthy_*: losses of the reference runs; label: the primary
    one. The training label is the drawup of an EMA of span 20 over 50 consecutive steps.
    """
    steps, loss = held_out
    training_steps, training_loss = training
    scaled = {
        f"delta x{scale:g}": divergence_step(
            loss, healthy_losses=healthy_held_out, steps=steps, label=label, delta_scale=scale, stopped=stopped
        )
        for scale in (0.5, 2.0)
    }
    return scaled | {
        "training loss": divergence_step(
            training_loss,
            healthy_losses=healthy_training,
            steps=training_steps,
            label=replace(label, ema_span=20, consecutive=50),
            stopped=stopped,
        ),
        "OLMo": rolling_sigma_step(training_loss, steps=training_steps),
        "LLM-Foundry": running_mean_step(training_loss, steps=training_steps),
    }


def is_degraded(loss: np.ndarray, calibration_losses: Sequence[np.ndarray], ema_span: int = 5) -> bool:
    """Whether a run ends above the largest final smoothed loss of the calibration runs. For runs that never diverge."""
    finals = [smoothed(healthy, ema_span)[-1] for healthy in calibration_losses]
    return bool(smoothed(loss, ema_span)[-1] > max(finals))
