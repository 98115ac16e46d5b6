"""Cases judged each by itself: what the table counts, on made-up readings with known answers."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.detect.tracks.universal import universal_threshold
from foreshock.analysis.figures.cases import cases_figure
from foreshock.analysis.scores import cases
from foreshock.analysis.scores.cases import ALL_LAWS, case_rows, totals
from foreshock.experiments.trace import Series

LAWS = {"one": "one.over_noise", "two": "two.over_noise"}
STEPS = np.arange(2, 22, 2)


def run(one, two=None, onset=None):
    """A run with readings (10, layers, heads) of each law; ``None``: its monitor predicts no noise for that law."""
    signals = {}
    for signal, values in (("one.over_noise", one), ("two.over_noise", two)):
        if values is not None:
            signals[signal] = Series(STEPS, STEPS * 8, np.asarray(values, float), np.isnan(values))
    return SimpleNamespace(signals=signals, onset=onset)


def constant(value):
    return np.full((10, 2, 2), value)


def rows_of(*runs):
    return {row["law"]: row for row in case_rows(runs, LAWS)}


def test_root_mean_square_range_and_largest_by_hand():
    rows = rows_of(run(constant(1.0), constant(3.0)), run(constant(2.0), constant(4.0)))
    assert rows["one"]["rms"] == pytest.approx(np.sqrt(2.5))
    assert (rows["one"]["rms_lowest_run"], rows["one"]["rms_highest_run"]) == (1.0, 2.0)
    assert rows[ALL_LAWS]["rms"] == pytest.approx(np.sqrt((1 + 4 + 9 + 16) / 4))
    assert rows[ALL_LAWS]["largest"] == 4.0 and rows[ALL_LAWS]["readings"] == 2 * 2 * 40
    assert rows["two"]["q50"] == 3.0 and rows["two"]["q75"] == 4.0


def test_the_threshold_counts_the_readings_of_all_laws_of_one_run():
    rows = rows_of(run(constant(1.0), constant(1.0)), run(constant(1.0), constant(1.0)))
    for law in (*LAWS, ALL_LAWS):
        assert rows[law]["threshold_5pct"] == universal_threshold(80, 0.05)
        assert rows[law]["threshold_01pct"] == universal_threshold(80, 0.001)


def test_a_run_alarms_once_by_whichever_law_and_from_its_first_reading_above():
    between = (universal_threshold(80, 0.05) + universal_threshold(80, 0.001)) / 2
    early, late = constant(1.0), constant(1.0)
    early[3, 1, 0] = between
    late[7, 0, 1] = 10.0
    rows = rows_of(run(early, late), run(constant(1.0), late), run(constant(1.0), constant(1.0)))
    assert [rows[law]["alarms_5pct"] for law in ("one", "two", ALL_LAWS)] == [1, 2, 2]
    assert [rows[law]["alarms_01pct"] for law in ("one", "two", ALL_LAWS)] == [0, 2, 2]
    assert (rows[ALL_LAWS]["median_alarm_step"], rows[ALL_LAWS]["latest_alarm_step"]) == (STEPS[7], STEPS[7])
    assert rows["one"]["latest_alarm_step"] == STEPS[3]
    assert np.isnan(rows["one"]["median_alarm_step"])  # the median run has no alarm


def test_readings_that_were_declined_are_counted_and_are_no_alarm():
    half = constant(1.0)
    half[::2] = np.nan
    rows = rows_of(run(half, constant(2.0)))
    assert rows["one"]["declined_share"] == 0.5 and rows["one"]["rms"] == 1.0
    assert rows[ALL_LAWS]["declined_share"] == 0.25 and rows[ALL_LAWS]["alarms_5pct"] == 0


def test_a_law_without_any_prediction_is_declined_whole():
    rows = rows_of(run(constant(1.0)))
    assert rows["two"]["declined_share"] == 1.0 and np.isnan(rows["two"]["rms"]) and rows["two"]["readings"] == 0


def test_a_reading_that_is_not_finite_and_not_declined_alarms():
    broken = run(constant(1.0), constant(1.0))
    broken.signals["one.over_noise"].values[4:] = np.nan
    row = rows_of(broken)[ALL_LAWS]
    assert row["alarms_01pct"] == 1 and row["latest_alarm_step"] == STEPS[4] and row["largest"] == np.inf


@pytest.fixture
def table(monkeypatch):
    runs = {
        "a": run(constant(1.0), constant(1.2)),
        "b": run(constant(9.0), constant(1.0)),
        "c": run(constant(5.0), constant(7.0), onset=0),
    }
    monkeypatch.setattr(cases, "read_runs", lambda folder, ids: [runs[one] for one in ids])
    index = {
        "experiment": {"cases": {"plain": {"label": "plain text"}, "fault": {}}, "laws": LAWS},
        "runs": [{"fault": "fault" if one == "c" else "plain", "run_id": one} for one in runs],
    }
    return cases.case_table(index, None)


def test_totals_are_of_the_healthy_cases_alone(table):
    whole = table[(table["case"] == cases.ALL_CASES) & (table["law"] == ALL_LAWS)].iloc[0]
    assert whole["runs"] == 2 and whole["alarms_5pct"] == 1
    assert whole["largest"] == 9.0
    assert table[table["case"] == "fault"]["healthy"].eq(False).all()
    assert totals(table, [], LAWS).empty


def test_the_figure_is_drawn_from_the_saved_table(table, tmp_path):
    table.to_csv(tmp_path / "zoo.csv", index=False)
    caption = cases_figure(pd.read_csv(tmp_path / "zoo.csv"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "0.9 to 1.1" in caption
