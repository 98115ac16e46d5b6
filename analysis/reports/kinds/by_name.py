"""Kinds of reports, one a file, by the name that an experiment's key ``draw`` gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreshock.analysis.reports.kinds.base import Kind
from foreshock.analysis.reports.kinds.central import Central
from foreshock.analysis.reports.kinds.doses import Doses
from foreshock.analysis.reports.kinds.early_warning import EarlyWarning
from foreshock.analysis.reports.kinds.faults import Faults
from foreshock.analysis.reports.kinds.grid import Grid
from foreshock.analysis.reports.kinds.leads import Leads
from foreshock.analysis.reports.kinds.localise import Localise
from foreshock.analysis.reports.kinds.paired import Paired
from foreshock.analysis.reports.kinds.selectivity import Selectivity
from foreshock.analysis.reports.kinds.smallest import Smallest

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Central(), Faults(), Doses(), Grid(), Selectivity(), Leads(), Localise(), EarlyWarning(), Smallest(), Paired(),
    )
}  # fmt: skip
"""A new kind is a file beside these, and its name here."""

CASES = "cases"
"""The kind of an experiment whose runs are judged each by itself: ``reports.cases`` makes its report."""

DRAWINGS = (*KINDS, CASES)
"""What the key ``draw`` of an experiment may be."""

NEEDED = {name: kind.needs for name, kind in KINDS.items()}
"""By kind, the keys of an experiment without which it cannot be drawn."""
BY_SIZE = tuple(name for name, kind in KINDS.items() if kind.by_size)
"""Kinds that tell faults by their number of bits, and delays in steps."""


def kind_of(index: Mapping[str, Any]) -> Kind:
    """The kind of report that an experiment's index asks for. Raises ValueError where there is none of that name."""
    name = index["experiment"]["draw"]
    if name not in KINDS:
        raise ValueError(f"experiment.draw={name!r} is not allowed: one of {', '.join(DRAWINGS)}")
    return KINDS[name]
