"""What the board's columns mean: one meaning in report and board, the best of three baselines, faults one by one."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from foreshock.analysis.reports.headline import headline
from foreshock.analysis.reports.leaderboard_print import print_board
from foreshock.analysis.runs.load import load
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.leaderboard import board
from foreshock.analysis.scores.outcome import best_baseline, relative_lead
from foreshock.analysis.scores.overall import MIN_FAULTS
from foreshock.analysis.scores.table import lead_table
from foreshock.experiments.build import ROOT
from tests.analysis.made_up_board import COUNTS, DETECTORS, EARLY, FAULTS, LATE, SIGNALS, with_singles

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
    report = lead_table(with_singles(three))
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
    assert best_baseline({"a": 1.0, "b": 3.0, "c": 3.0}, "abc") == "b"
    assert best_baseline({"a": float("nan"), "b": 0.0}, "ab") == "b"
    assert best_baseline({"a": float("nan")}, "a") is None and best_baseline({}, "") is None


def test_a_baseline_that_breaks_its_false_alarm_rate_is_best_only_where_all_do():
    assert best_baseline({"a": 1.0, "b": 3.0}, "a") == "a"
    assert best_baseline({"a": 1.0, "b": 3.0}, "") == "b"
    assert best_baseline({"a": float("nan"), "b": 3.0}, "a") == "b"


@pytest.fixture
def noisy(three):
    """The best baseline of each fault alarms in every healthy test run as well."""
    held = with_singles(three)
    for name in ("early", "late"):
        detector = held.detectors[name]
        false = {run.trace.run_id: 10 for run in three.of("test")}
        held.detectors[name] = replace(detector, alarms={**detector.alarms, **false})
    return held


def test_others_are_tested_against_a_baseline_that_keeps_its_rate(noisy):
    one = noisy.without_singles()
    table = board(one, run_scores(one)).set_index(["fault", "detector"]).sort_index()
    assert table.loc["attention", "baseline"].eq("held out").all() and table.loc["all", "baseline"].eq("held out").all()
    assert table.loc[("attention", "either"), "p_beats_baseline"] <= 1
    report = lead_table(noisy)
    assert report.loc[report["fault"] == "attention", "baseline"].dropna().eq("held out").all()


def test_detectors_are_tested_against_the_best_baseline_which_is_not_tested(three):
    table = rows_of(three)
    for fault in ("attention", "ramp"):
        rows = table.loc[fault]
        assert rows.loc[BASELINES, "kind"].eq("baseline").all() and rows.loc[BASELINES, "p_beats_baseline"].isna().all()
        assert 0 < rows.loc["either", "p_beats_baseline"] <= 1
    assert table.loc[("attention", "either"), "relative_lead_steps"] < 60  # the best one is early itself
    assert table.loc[("ramp", "early"), "relative_lead_steps"] < 0


def test_an_alarm_before_the_onset_is_no_answer_to_the_fault(three):
    held = with_singles(three)
    detector = held.detectors["early"]
    false = {run.trace.run_id: 10 for run in three.of("faulty", fault="attention")}
    held.detectors["early"] = replace(detector, alarms={**detector.alarms, **false})
    table = lead_table(held)
    rows = table[table["fault"] == "attention"].set_index("detector")
    assert rows.loc["early", "median_alarm_step"] == 10 and np.isnan(rows.loc["early", "median_alarm_from_onset_step"])
    assert rows.loc["late", "median_alarm_from_onset_step"] == rows.loc["late", "median_alarm_step"] > 301
    three.index["experiment"]["headline"] = ["early", "late"]
    said = headline(three, table[table["fault"] == "attention"])
    assert "late at step" in said and "early at" not in said and "none in the median run: early" in said


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
    assert rows_of(three, "self")["size_over_threshold"].isna().all()  # a z-score's threshold may be near 0


def printed(table, width=150, **options) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, **options)
    print_board(table.reset_index(), console)
    return console.file.getvalue()


def test_the_printed_board_says_what_its_columns_mean(three):
    said = " ".join(printed(rows_of(three)).split())
    assert "how many steps earlier the alarm is than that baseline's, under attention early, under ramp late" in said
    assert f"an overall rank or interval needs {MIN_FAULTS} faults that diverge, here are 2" in said
    assert "Size of attention:" in said and "times the threshold of" in said
    assert "a run without alarm counts to the horizon" in said and "*: a difference of leads" in said


def test_a_fault_below_every_threshold_is_said_to_be(three):
    table = rows_of(three)
    small = table.assign(size_over_threshold=table["size_over_threshold"].where(table["size_over_threshold"] <= 1))
    said = " ".join(printed(small).split())
    assert "Size of attention: stays below every threshold (largest" in said
    assert "Size of attention: stays" not in " ".join(printed(table).split())


BOARD = pd.read_csv(ROOT / "results" / "leaderboard.csv")


@pytest.mark.parametrize("model", ["mha_nano", "moe_nano"])
@pytest.mark.parametrize(("width", "terminal"), [(100, False), (150, False), (100, True), (150, True), (200, True)])
def test_every_name_is_there_and_whole_however_narrow(model, width, terminal):
    table = BOARD[(BOARD["model"] == model) & (BOARD["track"] == "reference")]
    lines = printed(table, width=width, force_terminal=terminal).splitlines()
    names = {line[2:].split("  ")[0] for line in lines}
    kinds = table["kind"].where(table["kind"] != "detector", "")
    of_rows = table["detector"] + kinds.map(lambda kind: kind and f" [{kind}]")
    assert {*of_rows[table["declined"].isna()]} <= names
    assert not any("\u2026" in line for line in lines)
    assert not terminal or max(map(len, lines)) <= width


def test_intervals_stay_where_there_is_room(three):
    ours = BOARD[(BOARD["model"] == "mha_nano") & (BOARD["track"] == "reference")]
    assert "1,407 (1,354–1,464)" in printed(ours, width=80)  # a pipe has no width
    assert "1,407 (1,354–1,464)" in printed(ours, width=200, force_terminal=True)
    assert "1,407 (" not in printed(ours, width=130, force_terminal=True)


def test_an_interval_of_ranks_is_not_rounded_past_its_point():
    row = {"experiment": "e", "model": "m", "track": "reference", "kind": "detector", "declined": None, "runs": 10}
    row |= {"healthy_alarms": 0, "healthy_runs": 9, "exploratory": False, "cost_share_of_step": np.nan}
    row |= {"rmlt_steps": 10.0, "rmlt_low": np.nan, "rmlt_high": np.nan, "relative_lead_steps": 0.0, "baseline": "b"}
    row |= {"p_beats_baseline": np.nan, "size_over_threshold": 2.0, "diverged": 10, "detected": 1.0}
    row |= {"share_of_possible_lead": 0.5, "share_low": 0.4, "share_high": 0.6}
    row |= {"rank": 11.5, "rank_low": 11.5, "rank_high": 14.5}
    faults = ["all", *(f"f{i}" for i in range(MIN_FAULTS))]
    assert "11.5 (11.5–14.5)" in printed(pd.DataFrame([{**row, "detector": "d", "fault": fault} for fault in faults]))
