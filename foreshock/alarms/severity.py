"""How severe an alarm is, and its runbook: a table, whose first row that fits decides.

SEV0: pause the training. SEV1: contain, before the next checkpoint is trusted. SEV2: investigate while it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

SEVERITIES = ("SEV0", "SEV1", "SEV2")
"""The most severe first."""

REPORTED, OWN = "reported", "watch"
"""Rules of events without a reading: what a training loop reports (``watch.report``), and what befalls the watch."""

RUNBOOKS = "docs/runbooks"


@dataclass(frozen=True)
class Row:
    """severity and runbook of the alarms that fit all of these.

    rule; signal, family: patterns; side: of the threshold, as an event has it; above: what a reading must stand above;
    readings: of this signal in a row, this one included, that broke the rule; risen: whether the reading must stand
    above that of the episode's first alarm.
    """

    severity: str
    runbook: str
    rule: str = "*"
    signal: str = "*"
    family: str = "*"
    side: str = "*"
    above: float | None = None
    readings: int = 1
    risen: bool = False


@dataclass(frozen=True)
class Case:
    """What a row is held against; first: the reading of the episode's first alarm."""

    rule: str
    signal: str
    family: str = ""
    side: str = ""
    value: float | None = None
    readings: int = 1
    first: float | None = None


TABLE: tuple[Row, ...] = (
    # SEV0: pause
    Row("SEV0", "numerics", rule="non_finite"),
    Row("SEV0", "numerics", rule="exact", signal="nan_inf_events*"),
    Row("SEV0", "numerics", rule=OWN, signal="overflow_storm"),
    Row("SEV0", "monitoring", rule=OWN, signal="monitoring_blackout"),
    Row("SEV0", "monitoring", rule=REPORTED, signal="checkpoint_failure"),
    # SEV1: contain
    Row("SEV1", "data", rule="exact", signal="loss_spike_score*", risen=True),
    Row("SEV2", "data", rule="exact", signal="loss_spike_score*"),
    Row("SEV1", "numerics", rule="exact"),
    Row("SEV1", "numerics", rule="universal"),
    Row("SEV1", "numerics", rule=REPORTED, signal="checksum_mismatch"),
    Row("SEV1", "attention", signal="max_attn_logit*", above=1000.0),
    Row("SEV1", "attention", signal="attn_entropy*", side="below", readings=3),
    Row("SEV1", "router", rule="published", signal="moe_drop_rate*", readings=10),
    Row("SEV1", "optimization", rule=REPORTED, signal="mfu_collapse"),
    Row("SEV1", "monitoring", rule=OWN),
    # SEV2: investigate
    Row("SEV2", "optimization", rule=REPORTED, signal="stall"),
    Row("SEV2", "data", rule=REPORTED),
    Row("SEV2", "data", signal="train_loss*"),
    Row("SEV2", "data", family="data"),
    Row("SEV2", "data", family="evaluation"),
    Row("SEV2", "optimization", family="optimization"),
    Row("SEV2", "optimization", signal="output_log_z*"),
    Row("SEV2", "attention", family="model_behavior"),
    Row("SEV2", "numerics", family="conservation"),
    Row("SEV2", "numerics", family="recomputation"),
    Row("SEV2", "router", family="router"),
    Row("SEV2", "weights", family="attention_update"),
    Row("SEV2", "weights", family="weight_structure"),
    Row("SEV2", "weights", family="random_matrix"),
    Row("SEV2", "monitoring"),
)

REPORTS = (
    "checkpoint_failure",
    "checksum_mismatch",
    "mfu_collapse",
    "mixture_drift",
    "duplicates",
    "validation_regression",
    "slice_regression",
    "stall",
)
"""Kinds of event that a training loop can report; no monitor reads them."""


def row_of(case: Case) -> Row:
    """The first row that fits."""
    return next(row for row in TABLE if _fits(row, case))


def runbook_path(row: Row) -> str:
    return f"{RUNBOOKS}/{row.runbook}.md"


def more_severe(severity: str, than: str) -> bool:
    return SEVERITIES.index(severity) < SEVERITIES.index(than)


def _fits(row: Row, case: Case) -> bool:
    named = all(
        fnmatchcase(getattr(case, field), getattr(row, field)) for field in ("rule", "signal", "family", "side")
    )
    large = row.above is None or (case.value is not None and case.value > row.above)
    risen = not row.risen or (case.first is not None and case.value is not None and case.value > case.first)
    return named and large and risen and case.readings >= row.readings
