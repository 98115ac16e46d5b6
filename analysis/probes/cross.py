"""Old and new weights under the old and the new harness: whose is the dip?

A harness is a command that prints, on its last line, a number or a JSON list of numbers, one an item; higher is better.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import permutation_test
from scipy.stats import t as student

from foreshock.analysis.probes.step import ALIKE, DIFFERS, NOT_COMPARED, Step

NAME = "old weights x new harness, and back"
WEIGHTS = "{weights}"
HARNESS, MODEL, BOTH, TOGETHER, NO_DIP, UNKNOWN = "harness", "weights", "both", "together", "no dip", "unknown"
RESAMPLES = 9999


@dataclass(frozen=True)
class Dip:
    """Of scores against the old weights under the old harness. change: of their mean; p: of a change as low by chance,
    sign-flip permutation over items; interval: of the change at 95 %, by Student's t over items, None where all change
    alike; both None for single numbers; dips: whether it is a dip, None where nobody said what one is.
    """

    change: float
    p: float | None
    dips: bool | None
    interval: tuple[float, float] | None = None

    def said(self) -> str:
        between = "" if self.interval is None else "{:+.4g} to {:+.4g}, ".format(*self.interval)
        return f"{self.change:+.4g}" + ("" if self.p is None else f" ({between}p = {self.p:.2g})")


@dataclass(frozen=True)
class Cross:
    """cause: of the dip: the harness, the weights, both by themselves, only both together, no dip, or unknown."""

    cause: str
    step: Step


def score(command: str, weights: Path, key: str, limit_s: float) -> np.ndarray:
    """The items' scores (n,), or one number (1,). Raises ValueError, in one line, where the command gives none."""
    if WEIGHTS not in command:
        raise ValueError(f"{key}={command!r} is not allowed: it has no {WEIGHTS}, where the path of the weights goes")
    parts = [part.replace(WEIGHTS, str(weights)) for part in shlex.split(command)]
    try:
        done = subprocess.run(parts, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{key}={command!r} has not ended within limit_s={limit_s:g}") from None
    except OSError as error:
        raise ValueError(f"{key}={command!r} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise ValueError(f"{key}={command!r} ended with code {done.returncode}: {said}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        scores = np.atleast_1d(np.asarray(json.loads(last), float))
    except (ValueError, TypeError):
        scores = np.empty(0)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{key}={command!r} printed {last[:60]!r} last: a number or a JSON list of numbers is needed")
    return scores


def dip(scores: np.ndarray, before: np.ndarray, alpha: float, tolerance: float | None) -> Dip:
    """Whether scores are lower than before: by more than chance over items, or a number by more than tolerance."""
    change = float(scores.mean() - before.mean())
    if len(scores) == 1:
        return Dip(change, None, None if tolerance is None else change < -tolerance)
    if (scores == before).all():
        return Dip(0.0, 1.0, False)
    test = permutation_test(
        (scores, before),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        alternative="less",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    p = float(test.pvalue)
    return Dip(change, p, p <= alpha and (tolerance is None or change < -tolerance), _interval(scores - before))


def _interval(changes: np.ndarray) -> tuple[float, float] | None:
    spread = changes.std(ddof=1)
    if spread <= 1e-12 * np.abs(changes).max():  # what rounding leaves of equal changes
        return None
    low, high = student.interval(0.95, len(changes) - 1, changes.mean(), spread / math.sqrt(len(changes)))
    return float(low), float(high)


def compare(
    weights: tuple[Path, Path], harnesses: tuple[str, str], alpha: float, tolerance: float | None, limit_s: float
) -> Cross:
    """Run four evaluations, old and new of both; each of the three that are not old alone is tested at alpha / 3.

    Raises ValueError where one gives no scores, or another number of items.
    """
    keys = ("old_harness", "new_harness")
    each = [(w, h) for h in (0, 1) for w in (0, 1)]
    scores = {(w, h): score(harnesses[h], weights[w], keys[h], limit_s) for w, h in each}
    before = scores[0, 0]
    for (w, h), found in scores.items():
        if len(found) != len(before):
            which = f"{('old', 'new')[w]} weights under the {('old', 'new')[h]} harness"
            raise ValueError(f"the {which} give {len(found)} scores, and the old under the old {len(before)}")
    dips = {at: dip(found, before, alpha / 3, tolerance) for at, found in scores.items() if at != (0, 0)}
    items = "a number" if len(before) == 1 else f"{len(before)} items"
    compared = f"{items} four times, {before.mean():.4g} at first"
    findings: tuple[str, ...] = (
        f"old weights under the new harness {dips[0, 1].said()}",
        f"new weights under the old harness {dips[1, 0].said()}",
        f"both new {dips[1, 1].said()}",
    )
    cause = _cause(dips[0, 1].dips, dips[1, 0].dips, dips[1, 1].dips)
    outcome = {UNKNOWN: NOT_COMPARED, NO_DIP: ALIKE}.get(cause, DIFFERS)
    if cause == UNKNOWN:
        findings = (*findings, "give tolerance= to say which change of a single number is a dip")
    return Cross(cause, Step(NAME, compared, outcome, findings))


def _cause(harness: bool | None, weights: bool | None, together: bool | None) -> str:
    if harness is None or weights is None or together is None:
        return UNKNOWN
    if harness and weights:
        return BOTH
    if harness or weights:
        return HARNESS if harness else MODEL
    return TOGETHER if together else NO_DIP


def check_number(value: str, key: str) -> float:
    """A positive number. Raises ValueError for anything else."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{key}={value} is not allowed: a positive number")
    return number
