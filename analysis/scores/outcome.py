"""One run, one alarm, one divergence: what the monitor is worth."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

OUTCOMES = ("lead", "late", "missed", "false_alarm", "benign_alarm", "quiet")
IN_TIME = ("lead", "benign_alarm")
"""Outcomes of a faulty run in which its fault is detected: an alarm from onset on, before divergence or the end."""


@dataclass(frozen=True)
class Score:
    """outcome: one of ``OUTCOMES``; restricted_lead_steps: None for runs that do not diverge by the horizon."""

    outcome: str
    restricted_lead_steps: int | None


def score(*, alarm: int | None, onset: int | None, divergence: int | None, horizon: int) -> Score:
    """Outcome and restricted lead of one run. All arguments are steps, or all tokens; ``onset=None`` is a healthy run.

    ``lead``: onset <= alarm < divergence. ``late``: alarm at or after divergence. ``missed``: divergence
    without alarm. ``false_alarm``: alarm before onset, or any in a healthy run. ``benign_alarm``: alarm
    after onset of a fault that does not diverge by the horizon. ``quiet``: neither. The restricted lead
    is divergence - alarm for ``lead`` and 0 for late, missed and false_alarm. Divergence after the
    horizon counts as none. Raises ValueError for an alarm beyond the horizon.
    """
    if alarm is not None and alarm > horizon:
        raise ValueError(f"alarm={alarm} is beyond the horizon of {horizon}")
    if divergence is not None and divergence > horizon:
        divergence = None
    if alarm is not None and (onset is None or alarm < onset):
        return Score("false_alarm", None if divergence is None else 0)
    if divergence is None:
        return Score("quiet" if alarm is None else "benign_alarm", None)
    if alarm is None:
        return Score("missed", 0)
    if alarm >= divergence:
        return Score("late", 0)
    return Score("lead", divergence - alarm)


def restricted_mean_lead(scores: Sequence[Score]) -> float:
    """RMLT: the mean restricted lead over the runs that diverge, misses included as 0; NaN if none diverges."""
    leads = [s.restricted_lead_steps for s in scores if s.restricted_lead_steps is not None]
    return float(np.mean(leads)) if leads else float("nan")


def relative_lead(
    alarm: int | None, baseline: int | None, *, onset: int | None, divergence: int | None, reach: int
) -> int | None:
    """How much earlier a run's alarm is than the baseline's, both at most its reach; None where it does not diverge.

    alarm, baseline: where they are raised, None for never, which counts as the reach. reach: where the scoring of the
    run ends, its horizon (``runs.experiment.ScoredRun``), not its divergence. An alarm before the onset counts as
    none, on either side. Under a fault that does no harm there is nothing to be early for.
    """
    if onset is None or divergence is None:
        return None
    at, other = (reach if step is None or step < onset else min(step, reach) for step in (alarm, baseline))
    return other - at


def best_baseline(leads: Mapping[str, float], keeping: Collection[str]) -> str | None:
    """The baseline of the largest mean lead, the first of several; None where none has one (NaN).

    keeping: who keeps its false-alarm rate. A baseline that does not is best only where no other has a lead.
    """
    known = {name: lead for name, lead in leads.items() if not math.isnan(lead)}
    known = {name: lead for name, lead in known.items() if name in keeping} or known
    return max(known, key=known.__getitem__) if known else None
