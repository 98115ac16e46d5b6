"""What became of a faulty run, judged from its held-out losses against those of healthy twins.

Everything is judged on the clean label (``labels.clean_label``), smoothed by an EMA of span 5 evaluations: l~ of the
run, h~_j of healthy run j, D and Delta of ``analysis.runs.labels``, T the run's last evaluation. Of these outcomes a
curve has the first that holds, so that it has exactly one:

    divergence          D(t) >= Delta for 5 consecutive evaluations, or a loss that is not finite (``divergence_step``)
    compromised         |o~(t) - l~(t)| >= Delta for 5 consecutive evaluations, o the loss through the run's own kernels
    spike and degrade   D(t) >= Delta for fewer evaluations together, and degraded: l~(T) > max_j h~_j(T)
    spike and recover   D(t) >= Delta for fewer evaluations together, and not degraded
    gradual drift       degraded, and still growing worse (below)
    silent degradation  degraded, and not
    no effect           none of these

A degraded run stands above every healthy run from some evaluation a on, to its end. Its gap g = l - median_j h_j of the
unsmoothed losses grows by d = mean of g over the second half of [a, T] - mean over the first. It drifts if d is larger
than that of every healthy run j against the others, over the same evaluations. Where either half has fewer than 5
evaluations, or there is one healthy run alone, nothing tells a slope from noise, and it is a silent degradation. A run
that leaves the healthy range at once and keeps its distance is one too.

No number here is of this module: Delta, 5 and the span are of the label, all else is the range of the healthy runs.
With n of them, a further healthy run ends above all with probability 1/(n + 1), and its largest drawup is above theirs
with no more: of n + 1 runs, each against the others, at most two are not ``no effect``. So of one run with 5 twins the
harmless outcome is wrong in up to a third, a degradation by itself in a sixth: a row of several seeds says more than
any of them. Drift is told from noise at one in n + 1 as well, given that the run is degraded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foreshock.analysis.runs.labels import (
    LABEL_SIGNAL,
    PRIMARY,
    DrawupLabel,
    clean_label,
    divergence_step,
    drawup,
    drawup_threshold,
    first_streak,
    is_degraded,
    smoothed,
)
from foreshock.experiments import trace
from foreshock.experiments.trace import Trace, TraceError

OUTCOMES = (
    "no effect",
    "spike and recover",
    "spike and degrade",
    "silent degradation",
    "gradual drift",
    "divergence",
    "compromised",
)
BETTER = "better than healthy"
"""The note of a run that ends below every healthy run: l~(T) < min_j h~_j(T)."""


@dataclass(frozen=True)
class Outcome:
    """outcome: one of ``OUTCOMES``; note: ``BETTER`` or empty; final_loss, healthy_final_losses: l~(T), h~_j(T), nats.

    The healthy ones are taken at the run's last evaluation, where they have come that far.
    """

    outcome: str
    note: str
    final_loss: float
    healthy_final_losses: tuple[float, ...]


def outcome(
    clean: np.ndarray,
    healthy: Sequence[np.ndarray],
    *,
    own: np.ndarray | None = None,
    reference: Sequence[np.ndarray] | None = None,
    label: DrawupLabel = PRIMARY,
    stopped: bool = False,
    broken: bool = False,
) -> Outcome:
    """The outcome of one run.

    clean: (N,) held-out losses through healthy kernels, in nats; own: (N,) through the run's own, where they differ;
    healthy: those of the healthy runs, at the same evaluations; reference: of the runs that set Delta, the healthy ones
    by default; stopped: the trainer ended it as diverged; broken: it ended with a training loss that is not finite.
    Raises ValueError without an evaluation, without healthy runs or where one of them has a non-finite loss, and where
    shapes do not fit.
    """
    clean = np.asarray(clean, float)
    own = clean if own is None else np.asarray(own, float)
    reference = healthy if reference is None else reference
    if not len(clean) or not len(healthy) or own.shape != clean.shape:
        shapes = f"{clean.shape}, own {own.shape}, and {len(healthy)} healthy runs"
        raise ValueError(f"clean losses of shape {shapes}: an outcome needs one of each, and as many own losses")
    twins = [np.asarray(losses, float)[: len(clean)] for losses in healthy]
    steps = np.arange(len(clean))
    diverged = divergence_step(clean, healthy_losses=reference, steps=steps, label=label, stopped=stopped)
    finals = tuple(float(smoothed(losses, label.ema_span)[-1]) for losses in twins)
    final = float(smoothed(clean, label.ema_span)[-1]) if np.isfinite(clean).all() else float("nan")
    if broken or diverged is not None or not np.isfinite(own).all():
        return Outcome("divergence", _note(final, finals), final, finals)
    delta = drawup_threshold(reference, label)
    spikes = bool(np.any(drawup(clean, label.ema_span) >= delta))
    degraded = is_degraded(clean, twins, label.ema_span)
    if _parted(own, clean, delta, label):
        name = "compromised"
    elif spikes:
        name = "spike and degrade" if degraded else "spike and recover"
    elif degraded:
        name = "gradual drift" if _drifts(clean, twins, label) else "silent degradation"
    else:
        name = "no effect"
    return Outcome(name, _note(final, finals), final, finals)


def _note(final: float, finals: Sequence[float]) -> str:
    return BETTER if final < min(finals) else ""


def _parted(own: np.ndarray, clean: np.ndarray, delta: float, label: DrawupLabel) -> bool:
    """Whether the two labels part by ``delta`` for as many evaluations together as a divergence lasts."""
    apart = np.abs(smoothed(own, label.ema_span) - smoothed(clean, label.ema_span)) >= delta
    return first_streak(apart, label.consecutive) is not None


def _drifts(clean: np.ndarray, twins: Sequence[np.ndarray], label: DrawupLabel) -> bool:
    """Whether a degraded run's gap to its twins still grows, by more than that of any twin to the others."""
    n = min(len(clean), *map(len, twins))
    range_top = np.max([smoothed(losses[:n], label.ema_span) for losses in twins], axis=0)
    inside = np.flatnonzero(smoothed(clean[:n], label.ema_span) <= range_top)
    left = int(inside[-1]) + 1 if len(inside) else 0
    middle = (left + n) // 2
    if middle - left < label.consecutive or len(twins) < 2:
        return False

    def growth(losses: np.ndarray, others: Sequence[np.ndarray]) -> float:
        gap = losses[:n] - np.median([other[:n] for other in others], axis=0)
        return float(np.mean(gap[middle:]) - np.mean(gap[left:middle]))

    of_healthy = [growth(losses, [*twins[:j], *twins[j + 1 :]]) for j, losses in enumerate(twins)]
    return growth(clean, twins) > max(of_healthy)


def outcome_of(run: Trace, healthy: Sequence[Trace], label: DrawupLabel = PRIMARY) -> Outcome:
    """The outcome of a saved run against saved healthy twins, at equal steps; the twins set Delta too.

    Raises TraceError where a run has no held-out loss, and ValueError where the twins were evaluated at other steps.
    """
    for twin in (run, *healthy):
        if LABEL_SIGNAL not in twin.signals:
            raise TraceError(f"run {twin.run_id} has no {LABEL_SIGNAL}, which an outcome is judged by")
    clean, own = clean_label(run), run.signals[LABEL_SIGNAL]
    labels = [clean_label(twin) for twin in healthy]
    for twin, series in zip(healthy, labels, strict=True):
        shared = min(len(series.steps), len(clean.steps))
        if not np.array_equal(series.steps[:shared], clean.steps[:shared]):
            raise ValueError(f"runs {run.run_id} and {twin.run_id} were evaluated at different steps")
    return outcome(
        clean.values.ravel(),
        [series.values.ravel() for series in labels],
        own=own.values.ravel(),
        label=label,
        stopped=run.end_reason == "diverged",
        broken=run.end_reason == "non_finite",
    )


def outcome_of_folders(run: Path, healthy: Sequence[Path], label: DrawupLabel = PRIMARY) -> Outcome:
    """``outcome_of`` run folders. Raises TraceError where one is missing, damaged or unfinished."""
    return outcome_of(trace.read(run), [trace.read(folder) for folder in healthy], label)
