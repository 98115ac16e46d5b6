"""Kinds of reports, one a file, by the name that an experiment's key ``draw`` gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from analysis.reports.kinds.base import Kind
from analysis.reports.kinds.central import Central
from analysis.reports.kinds.doses import Doses
from analysis.reports.kinds.early_warning import EarlyWarning
from analysis.reports.kinds.faults import Faults
from analysis.reports.kinds.grid import Grid
from analysis.reports.kinds.leads import Leads
from analysis.reports.kinds.localise import Localise
from analysis.reports.kinds.paired import Paired
from analysis.reports.kinds.selectivity import Selectivity
from analysis.reports.kinds.smallest import Smallest

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


def kind_of(index: Mapping[str, Any]) -> Kind:
    """The kind of report that an experiment's index asks for. Raises ValueError where there is none of that name."""
    name = index["experiment"]["draw"]
    if name not in KINDS:
        raise ValueError(f"experiment.draw={name!r} is not allowed: one of {', '.join(DRAWINGS)}")
    return KINDS[name]
