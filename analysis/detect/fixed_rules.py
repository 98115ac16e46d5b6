"""Rules in use whose number nobody calibrates: what they cost in false alarms is what healthy runs show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from foreshock.analysis.detect.alarms import first_alarm
from foreshock.analysis.detect.bands import student_threshold
from foreshock.analysis.detect.charts import Shewhart
from foreshock.analysis.detect.own_past import MEDIAN_WINDOW, Statistic, TrailingMedian, Watcher
from foreshock.analysis.detect.published import published_rule
from foreshock.analysis.runs.align import Aligned
from foreshock.analysis.runs.elsewhere import TRAIN_LOSS
from foreshock.analysis.runs.experiment import ScoredRun
from foreshock.analysis.runs.labels import rolling_sigma_step, running_mean_step
from foreshock.monitors.signal import Signal

GRADIENT_NORM = "grad_global_norm"


class FixedRule(Protocol):
    """name: in tables; signal: that it reads; kind: of its rows; alarm: the step of the first one, or None."""

    @property
    def name(self) -> str: ...
    @property
    def signal(self) -> str: ...
    @property
    def kind(self) -> str: ...
    def alarm(self, run: ScoredRun) -> int | None: ...


@dataclass(frozen=True)
class TimesMedian:
    """A signal strictly above ``factor`` times the median of the 50 readings before it; the first 50 have no say."""

    factor: float
    signal: str = GRADIENT_NORM
    kind: str = "detector"

    @property
    def name(self) -> str:
        what = {GRADIENT_NORM: "gradient norm", TRAIN_LOSS: "training loss"}.get(self.signal, self.signal)
        return f"{what} above {self.factor:g}x its median"

    def alarm(self, run: ScoredRun) -> int | None:
        watcher = Watcher(self.name, self.signal, "up", TrailingMedian(MEDIAN_WINDOW), Shewhart())
        return Statistic(*watcher.statistic(run)).alarm(math.log(self.factor))


@dataclass(frozen=True)
class OlmoSpike:
    """A training loss more than 7 deviations above the mean of up to 1,000 readings before (arXiv:2501.00656, 3.1)."""

    name: str = "training loss 7 sigma above its mean (OLMo)"
    signal: str = TRAIN_LOSS
    kind: str = "baseline"

    def alarm(self, run: ScoredRun) -> int | None:
        series = run.signal(self.signal)
        return rolling_sigma_step(series.values.ravel(), steps=series.steps)


@dataclass(frozen=True)
class FoundryRise:
    """A training loss of twice its running mean for 5 readings in a row (LLM-Foundry's ``KillLossSpike``).

    The alarm is raised at the fifth.
    """

    name: str = "training loss twice its mean (LLM-Foundry)"
    signal: str = TRAIN_LOSS
    kind: str = "baseline"
    consecutive: int = 5

    def alarm(self, run: ScoredRun) -> int | None:
        series = run.signal(self.signal)
        loss = series.values.ravel()
        start = running_mean_step(loss, steps=series.steps, consecutive=self.consecutive)
        if start is None:
            return None
        at = int(np.searchsorted(series.steps, start))
        return start if not np.isfinite(loss[at]) else int(series.steps[at + self.consecutive - 1])


@dataclass(frozen=True)
class SelfBound:
    """z-scores of the self track at the number that normal, independent readings pass with probability ``alpha``.

    A reading less the mean of W + 1 others, over their standard deviation, times sqrt((W + 1) / (W + 2)), is Student's
    t with W degrees of freedom; Bonferroni over the run's readings. Training is neither normal nor independent, so it
    promises nothing there: it is what can be said of a run without any twin.
    """

    signal: str
    bad: str
    alpha: float = 0.05
    kind: str = "detector"

    @property
    def name(self) -> str:
        return f"{self.signal}, self z above its bound"

    def alarm(self, run: ScoredRun) -> int | None:
        watcher = Watcher(self.name, self.signal, self.bad, rule=Shewhart())
        path = Statistic(*watcher.statistic(run))
        looks = int((~np.isnan(path.values)).sum())
        return path.alarm(self_bound(looks, self.alpha, self.bad)) if looks else None


@dataclass(frozen=True)
class PublishedLimit:
    """A reading beyond the limit that the signal's own source publishes (``detect.published``)."""

    described: Signal
    kind: str = "detector"

    @property
    def name(self) -> str:
        return f"{self.signal} beyond its published limit"

    @property
    def signal(self) -> str:
        return self.described.name

    def alarm(self, run: ScoredRun) -> int | None:
        series = run.signal(self.signal)
        aligned = Aligned(series.steps, series.values, series.undefined)
        return first_alarm(published_rule(self.described).broken_at(aligned).astype(float), series.steps, 0.5)


def self_bound(looks: int, alpha: float, bad: str = "up") -> float:
    """The z-score of the self track that so many looks pass with probability at most alpha (``SelfBound``)."""
    if looks < 1 or not 0 < alpha < 1:
        raise ValueError(f"looks={looks}, alpha={alpha} is not allowed: at least 1 look, alpha between 0 and 1")
    return student_threshold(alpha / looks / (2 if bad == "both" else 1))


SPIKE_RULES: tuple[FixedRule, ...] = (TimesMedian(1.5), TimesMedian(2.0), OlmoSpike(), FoundryRise())
"""In the tables of runs from elsewhere. Their windows are readings, whatever steps lie between those."""
