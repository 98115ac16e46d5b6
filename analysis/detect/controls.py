"""Detectors that cannot know anything, and one that knows it all: the rows that every other is read against."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

from foreshock.analysis.runs.experiment import Experiment, ScoredRun

Alarm = Callable[[ScoredRun, Experiment, float], int | None]
"""Of a run, its experiment and the false-alarm rate alpha."""


def never(run: ScoredRun, experiment: Experiment, alpha: float) -> int | None:
    """No alarm at all: what a miss is worth."""
    return None


def random_timer(run: ScoredRun, experiment: Experiment, alpha: float) -> int | None:
    """A constant hazard that alarms in a share alpha of healthy runs by the horizon; fixed by the run's id."""
    uniform = (int.from_bytes(hashlib.sha256(run.trace.run_id.encode()).digest()[:8], "big") + 0.5) / 2**64
    hazard = -math.log1p(-alpha) / experiment.horizon
    alarm = math.ceil(-math.log(uniform) / hazard)
    return alarm if alarm <= run.horizon else None


def step_counter(run: ScoredRun, experiment: Experiment, alpha: float) -> int | None:
    """Alarms at the position that, as a conformal threshold on healthy runs' lengths, keeps alpha: their end, so never.

    A monitor that only tells how old a run is can do no better.
    """
    reach = sorted(other.horizon for other in experiment.of("calibration"))
    return reach[-1] + 1 if run.horizon > reach[-1] else None


def onset_oracle(run: ScoredRun, experiment: Experiment, alpha: float) -> int | None:
    """The onset itself: the most that any detector could earn."""
    return run.onset


CONTROLS: dict[str, Alarm] = {
    "never": never,
    "random timer": random_timer,
    "step counter": step_counter,
    "onset oracle": onset_oracle,
}
