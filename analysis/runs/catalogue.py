"""The catalogue of monitors: what each measures, where it comes from, and what it answers to."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd

CATALOGUE = Path(__file__).resolve().parents[2] / "monitors" / "catalogue.csv"


@lru_cache(maxsize=1)
def catalogue() -> pd.DataFrame:
    """Its rows, by id: the ``reference`` of a signal."""
    return pd.read_csv(CATALOGUE).set_index("id")
