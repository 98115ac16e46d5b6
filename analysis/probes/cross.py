"""Old and new weights under the old and the new harness: whose is the dip?

A harness is a command that prints, on its last line, a number or a JSON list of numbers, one an item; higher is better.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
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
    alike; both None for a number or too few items; dips: whether it is a dip, None where nobody said what one is.
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
    code, out, errors = _run(command, weights, key, limit_s)
    if code != 0:
        said = (errors.strip().splitlines() or ["it printed no error"])[-1]
        raise ValueError(f"{key}={command!r} ended with code {code}: {said}")
    last = (out.strip().splitlines() or [""])[-1]
    try:
        scores = np.atleast_1d(np.asarray(json.loads(last), float))
    except (ValueError, TypeError):
        scores = np.empty(0)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{key}={command!r} printed {last[:60]!r} last: a number or a JSON list of numbers is needed")
    return scores


def _run(command: str, weights: Path, key: str, limit_s: float) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in a session of its own, which ends with it at the time limit."""
    try:
        parts = [part.replace(WEIGHTS, str(weights)) for part in shlex.split(command)]
        process = subprocess.Popen(
            parts,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except ValueError as error:
        raise ValueError(f"{key}={command!r} cannot be read: {error}") from None
    except OSError as error:
        raise ValueError(f"{key}={command!r} cannot be run: {error.strerror}") from None
    try:
        out, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{key}={command!r} has not ended within limit_s={limit_s:g}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, out, errors


def dip(scores: np.ndarray, before: np.ndarray, alpha: float, tolerance: float | None) -> Dip:
    """Whether scores are lower than before: by more than chance over items, or a number by more than tolerance."""
    change = float(scores.mean() - before.mean())
    if 2.0 ** -len(scores) > alpha:  # no change of so few items is seldom enough
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
        findings = (*findings, f"give tolerance= to say what a dip is: {items} can show none by chance alone")
    return Cross(cause, Step(NAME, compared, outcome, findings))


def _cause(harness: bool | None, weights: bool | None, together: bool | None) -> str:
    if harness is None or weights is None or together is None:
        return UNKNOWN
    if not together:
        return NO_DIP  # whatever a swap by itself does: what is run today scores as before
    if harness and weights:
        return BOTH
    if harness or weights:
        return HARNESS if harness else MODEL
    return TOGETHER


def check_number(value: str, key: str) -> float:
    """A positive number. Raises ValueError for anything else."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{key}={value} is not allowed: a positive number")
    return number
