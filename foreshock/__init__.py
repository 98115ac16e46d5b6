"""foreshock: which monitor sees a training failure coming first, how surely, and does it name the cause?

Everything is importable under this name: ``foreshock.faults``, ``foreshock.models``, ``foreshock.monitors``,
``foreshock.experiments``, ``foreshock.analysis``. In a clone these are its top-level folders, and ``faults.base`` is
the very module ``foreshock.faults.base``; installed, there is no other name, so that a ``models`` folder of yours
stays yours.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from foreshock._clone import is_clone, one_name

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent

if is_clone(ROOT):
    __path__.append(str(ROOT))
    one_name()


def load(folder: Path | str, signals: Iterable[str] | None = None, runs: Iterable[str] | None = None) -> pd.DataFrame:
    """Readings of the finished runs in a folder as one tidy pandas table (``analysis.runs.frame.load``).

    Columns: run_id, step, tokens, signal, layer, head, value, undefined, fault, seed, role. signals, runs: names of
    those that are wanted, all by default. Run folders, reduced sets and runs from elsewhere alike. Raises ValueError
    for an unknown name, with the nearest, and TraceError where there is no finished run or a file is damaged.
    """
    from foreshock.analysis.runs import frame

    return frame.load(folder, signals, runs)
