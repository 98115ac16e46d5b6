"""How a false-alarm probability is spread over the readings of a run, whose length is known or not."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_A_LOOK = 0.13
"""The largest level of one look (``universal_threshold``)."""
OPEN_SCALE_STEPS = 10_000
"""Steps over which an open budget spends almost evenly."""


@dataclass(frozen=True)
class Budget:
    """alpha: the probability of any false alarm of a rule in a run; horizon_steps: its planned length, None for open.

    Signals of a rule share alpha alike, and so do the values of a reading (Bonferroni, so that none of them need be
    independent). In time,

    planned: of horizon / cadence readings each has the same share. That is the number of ``universal_threshold`` with
        looks = readings x values. After the horizon the number stays; what it promised is then spent.
    open: by step k the share spent is S(k) = 1 - 1 / (1 + ln(1 + k / K)), K = 10,000 steps, and a reading at step k
        after one at step j has S(k) - S(j). S rises to 1 and never reaches it, so the sum over a run of any length
        stays below alpha, at whatever steps it is read. Up to K it is nearly alpha / K a step; later it falls as
        1 / (k ln^2 k), near the slowest that still sums, so that the threshold rises slowly: for one universal
        signal of 100 values read every 10 steps it is 5.1 at step 1,000, 5.4 at 10,000 and 6.4 at 1,000,000.

    Raises ValueError for an alpha outside (0, 1) and a horizon below 1.
    """

    alpha: float = 0.05
    horizon_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alarms.alpha={self.alpha} is not allowed: between 0 and 1")
        if self.horizon_steps is not None and self.horizon_steps < 1:
            raise ValueError(f"alarms.horizon_steps={self.horizon_steps} is not allowed: at least 1, or None")

    def a_look(self, step: int, before: int, every_steps: int, looks: int, signals: int) -> float:
        """The level of each of so many values read at a step; before: the step of the signal's last reading, or 0."""
        if self.horizon_steps is not None:
            share = 1 / max(1, self.horizon_steps // every_steps)
        else:
            share = _spent(step) - _spent(before)
        return min(self.alpha * share / (signals * looks), MOST_A_LOOK)

    def per_million_steps(self, step: int) -> float:
        """At most so many false alarms of the rule, at the rate of this step."""
        if self.horizon_steps is not None:
            return 1e6 * self.alpha / self.horizon_steps
        logarithm = 1 + math.log1p(step / OPEN_SCALE_STEPS)
        return 1e6 * self.alpha / (OPEN_SCALE_STEPS + step) / logarithm**2


def _spent(step: int) -> float:
    return 1 - 1 / (1 + math.log1p(step / OPEN_SCALE_STEPS))
