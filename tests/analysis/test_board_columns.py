"""What the board's columns mean: one meaning in report and board, the best of three baselines, faults one by one."""

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from analysis.contest import contest, run_scores
from analysis.experiment import load
from analysis.leaderboard import board
from analysis.leaderboard_print import print_board
from analysis.overall import MIN_FAULTS
from analysis.score import best_baseline, relative_lead
from analysis.table import lead_table
from tests.analysis.made_up_board import COUNTS, DETECTORS, EARLY, FAULTS, LATE, SIGNALS

THREE = {**DETECTORS, "held out": ["held_out_loss"]}
BASELINES = ["late", "held out", "early"]


@pytest.fixture
def three(made):
    """Three baselines under a fault whose first alarm is the early one's, one whose is the late one's, and no harm."""
    return load(*[made(COUNTS, SIGNALS, THREE, FAULTS, baseline=BASELINES)] * 2)


def rows_of(experiment, track="reference"):
    one = contest(experiment, track)
    return board(one, run_scores(one)).set_index(["fault", "detector"]).sort_index()


def test_report_and_board_show_the_same_number_on_the_same_runs(three):
    on_board = rows_of(three)
    report = lead_table(three)
    report = report[report["kind"] == "detector"].set_index(["fault", "detector"]).sort_index()
    columns = ["relative_lead_steps", "detected", "rmlt_steps", "late", "missed", "false_alarm", "threshold"]
    pd.testing.assert_frame_equal(report[columns], on_board.loc[report.index, columns], check_dtype=False)
    assert report.loc["attention", "baseline"].eq("early").all() and on_board.loc["ramp", "baseline"].eq("late").all()
    assert report.loc["batch8", "relative_lead_steps"].isna().all()


def test_late_alarms_are_no_detection_and_end_the_wait(three):
    one = contest(three, "reference")
    scores = run_scores(one)
    late = scores[scores["outcome"] == "late"]
    assert len(late) and late["alarmed"].all() and not late["detected"].any()
    assert (late["delay"] == late["alarm"] - late["onset"]).all()


@pytest.mark.parametrize(
    ("alarm", "baseline", "lead"),
    [
        (400, 700, 300),
        (700, 400, -300),
        (400, None, 600),  # never counts as the end of the run
        (None, 400, -600),
        (None, None, 0),
        (200, 400, -600),  # before the onset counts as never
        (400, 200, 600),
        (850, 900, 50),  # both after the divergence
    ],
)
def test_a_relative_lead_is_the_baselines_alarm_less_ones_own(alarm, baseline, lead):
    assert relative_lead(alarm, baseline, onset=301, divergence=800, reach=1000) == lead


def test_there_is_no_relative_lead_without_harm_or_fault():
    assert relative_lead(400, 700, onset=301, divergence=None, reach=1000) is None
    assert relative_lead(400, 700, onset=None, divergence=None, reach=1000) is None


def test_the_best_baseline_has_the_largest_mean_lead():
    assert best_baseline({"a": 1.0, "b": 3.0, "c": 3.0}) == "b"
    assert best_baseline({"a": float("nan"), "b": 0.0}) == "b"
    assert best_baseline({"a": float("nan")}) is None and best_baseline({}) is None


def test_detectors_are_tested_against_the_best_baseline_which_is_not_tested(three):
    table = rows_of(three)
    for fault in ("attention", "ramp"):
        rows = table.loc[fault]
        assert rows.loc[BASELINES, "kind"].eq("baseline").all() and rows.loc[BASELINES, "p_beats_baseline"].isna().all()
        assert 0 < rows.loc["either", "p_beats_baseline"] <= 1
    assert table.loc[("attention", "either"), "relative_lead_steps"] < 60  # the best one is early itself
    assert table.loc[("ramp", "early"), "relative_lead_steps"] < 0


@pytest.mark.parametrize("given", ["late", ["late", "elsewhere"]])
def test_one_baseline_may_be_named_alone_and_one_that_no_run_has_is_left_out(made, given):
    folder = made(COUNTS, SIGNALS, DETECTORS, FAULTS, baseline=given)
    assert load(folder, folder).baselines == ("late",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lat", "experiment.baseline='lat' is not allowed: of early, late"),
        (["late", "loss"], "experiment.baseline='loss' is not allowed"),
        (["elsewhere"], "experiment.baseline=elsewhere: no run of mha_nano has their signals"),
    ],
)
def test_a_baseline_that_is_no_detector_is_an_error(made, given, message):
    folder = made(COUNTS, SIGNALS, DETECTORS, FAULTS, baseline=given)
    with pytest.raises(ValueError, match=message):
        _ = load(folder, folder).baselines


def test_two_faults_are_no_ranking(three):
    overall = rows_of(three).loc["all"]
    for column in ("rank", "rank_low", "share_low", "share_high", "rmlt_low", "rmlt_high", "p_beats_baseline"):
        assert overall[column].isna().all(), column
    assert overall["possibly_best"].isna().all()
    by_fault = rows_of(three)["share_of_possible_lead"]
    for name in ("early", "late", "either"):
        mean = (by_fault[("attention", name)] + by_fault[("ramp", name)]) / 2
        assert overall.loc[name, "share_of_possible_lead"] == pytest.approx(mean)


def test_eight_faults_are_ranked_over_faults_and_seeds(made):
    faults = {
        f"f{i}": {"shows": {EARLY: 350 + 20 * i, LATE: 640}, "diverges": 800, "onset": 301} for i in range(MIN_FAULTS)
    }
    experiment = load(*[made(COUNTS, SIGNALS, THREE, faults, baseline=["late", "held out"])] * 2)
    overall = rows_of(experiment).loc["all"]
    early, late = overall.loc["early"], overall.loc["late"]
    assert early["share_low"] < early["share_of_possible_lead"] < early["share_high"]
    assert early["share_high"] - early["share_low"] > 0.1  # shares of 0.9 to 0.6: most of it is between faults
    assert (
        early["rank_low"] <= early["rank"] <= 2 < late["rank"] and early["possibly_best"] and not late["possibly_best"]
    )
    assert early["p_beats_baseline"] < 0.01 and early["baseline"] == "late"
    assert np.isnan(overall.loc["onset oracle", "rank"])


def test_a_fault_is_as_large_as_it_stands_above_a_threshold(three):
    table = rows_of(three)
    detector = contest(three, "reference").detectors["early"]
    sizes = []
    for run in three.of("faulty", fault="attention"):
        ((where, statistic),) = detector.charts[run.trace.run_id]
        sizes.append(np.nanmax(statistic[(where >= 301) & (where < run.divergence)]) / detector.threshold)
    assert table.loc[("attention", "early"), "size_over_threshold"] == pytest.approx(np.median(sizes))
    assert table.loc[("attention", "early"), "size_over_threshold"] > 5
    assert table.loc[("ramp", "early"), "size_over_threshold"] < 1.5  # it does not show there
    assert table.loc["all", "size_over_threshold"].isna().all()


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=150)
    print_board(table.reset_index(), console)
    return console.file.getvalue()


def test_the_printed_board_says_what_its_columns_mean(three):
    said = " ".join(printed(rows_of(three)).split())
    assert "how many steps earlier the alarm is than that baseline's, under attention early, under ramp late" in said
    assert f"an overall rank or interval needs {MIN_FAULTS} faults that diverge, here are 2" in said
    assert "Size of attention:" in said and "times the threshold of" in said


def test_an_interval_of_ranks_is_not_rounded_past_its_point():
    row = {"experiment": "e", "model": "m", "track": "reference", "kind": "detector", "declined": None, "runs": 10}
    row |= {"healthy_alarms": 0, "healthy_runs": 9, "exploratory": False, "cost_share_of_step": np.nan}
    row |= {"rmlt_steps": 10.0, "rmlt_low": np.nan, "rmlt_high": np.nan, "relative_lead_steps": 0.0, "baseline": "b"}
    row |= {"p_beats_baseline": np.nan, "size_over_threshold": 2.0, "diverged": 10, "detected": 1.0}
    row |= {"share_of_possible_lead": 0.5, "share_low": 0.4, "share_high": 0.6}
    row |= {"rank": 11.5, "rank_low": 11.5, "rank_high": 14.5}
    faults = ["all", *(f"f{i}" for i in range(MIN_FAULTS))]
    assert "11.5 (11.5–14.5)" in printed(pd.DataFrame([{**row, "detector": "d", "fault": fault} for fault in faults]))
