"""The table of severities: every row is live, and every link of it exists."""

import pytest

from foreshock.alarms.severity import OWN, REPORTED, REPORTS, SEVERITIES, TABLE, Case, row_of, runbook_path
from foreshock.experiments.build import ROOT


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.severity}-{row.rule}-{row.signal}-{row.family}")
def test_every_row_has_a_runbook_and_is_reached(row):
    text = (ROOT / runbook_path(row)).read_text(encoding="utf-8")
    for heading in ("Evidence", "Containment", "Probe to replay", "Verify the fix"):
        assert f"## {heading}\n" in text
    assert row.severity in SEVERITIES
    plain = {field: getattr(row, field).removesuffix("*") for field in ("rule", "signal", "family", "side")}
    value = (row.above or 0.0) + 1
    case = Case(**plain, value=value, readings=row.readings, first=0.0 if row.risen else None)
    assert row_of(case) is row


@pytest.mark.parametrize(
    ("kind", "severity"),
    [("checkpoint_failure", "SEV0"), ("checksum_mismatch", "SEV1"), ("mfu_collapse", "SEV1"), ("duplicates", "SEV2")],
)
def test_reports(kind, severity):
    assert kind in REPORTS and row_of(Case(REPORTED, kind)).severity == severity


@pytest.mark.parametrize(
    ("kind", "severity"), [("monitoring_blackout", "SEV0"), ("overflow_storm", "SEV0"), ("monitor_failed", "SEV1")]
)
def test_what_befalls_the_watch(kind, severity):
    assert row_of(Case(OWN, kind)).severity == severity


def test_every_runbook_is_linked():
    written = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert written == {runbook_path(row) for row in TABLE}


def test_every_family_of_a_monitor_has_a_row_of_its_own():
    from foreshock.attaching.choice import configured

    families = {signal.family for monitor in configured(["*"], None).values() for signal in monitor.signals}
    unread = {"observability", "oracle"}  # judged by rule; never attached
    assert {row_of(Case("self", "x", family)).runbook for family in families - unread}.isdisjoint({"monitoring"})
