"""The catalogue of monitors, and the thresholds that their sources publish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.detect.bands import DeclinedSignal, finite_or_inf
from analysis.runs.align import Aligned

CATALOGUE = Path(__file__).resolve().parents[2] / "monitors" / "catalogue.csv"


@lru_cache(maxsize=1)
def catalogue() -> pd.DataFrame:
    """Every monitor's definition, family and published rule, by id."""
    return pd.read_csv(CATALOGUE).set_index("id")


def family(signal: str) -> str:
    """The family of a signal, whose name begins with its catalogue id; ``unknown`` for a monitor not in there."""
    known, name = catalogue(), signal.split(".")[0]
    return str(known.loc[name, "family"]) if name in known.index else "unknown"


@dataclass(frozen=True)
class PublishedRule:
    """An alarm where a raw reading stands strictly above ``above`` or below ``below``, as its source says."""

    above: float
    below: float

    def broken_at(self, series: Aligned) -> np.ndarray:
        """(T,): whether any layer or head breaks the rule; a non-finite value does, a missing one does not."""
        x = finite_or_inf(series)
        return ((x > self.above) | (x < self.below)).any(axis=(1, 2))


def published_rule(signal: str) -> PublishedRule:
    """The numeric rule of a signal's source. Raises DeclinedSignal where the source gives no number."""
    known: Mapping = catalogue()
    name = signal.split(".")[0]
    limits = known.loc[name, ["alarm_above", "alarm_below"]].astype(float) if name in known.index else None
    if limits is None or limits.isna().all():
        raise DeclinedSignal(f"{signal}: no published threshold")
    above, below = limits
    return PublishedRule(np.inf if np.isnan(above) else above, -np.inf if np.isnan(below) else below)
