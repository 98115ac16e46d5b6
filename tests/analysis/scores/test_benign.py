"""A benign control is no fault: no board has it and its alarms are counted by themselves; a clean label judges runs."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.detect.external import read_alarms
from foreshock.analysis.detect.tracks.by_name import TRACKS
from foreshock.analysis.report import make_report
from foreshock.analysis.runs.labels import CLEAN_SIGNAL, LABEL_SIGNAL
from foreshock.analysis.runs.load import load
from foreshock.analysis.runs.outcomes import outcome_of_folders
from foreshock.analysis.runs.simulated import simulate_experiment
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.leaderboard import board
from foreshock.analysis.scores.outcomes import benign_table, outcome_table
from foreshock.analysis.scores.table import lead_table
from foreshock.experiments import trace
from foreshock.experiments.training.run_writer import CLEAN, HELD_OUT
from foreshock.faults.card import BENIGN
from tests.analysis.made_up_board import COUNTS, DETECTORS, EARLY, FAULTS, SIGNALS
from tests.injections import card

ALARMING = {"shows": {EARLY: 500}, "diverges": 700, "onset": 301, "injection": card(family="benign")}
SILENT = {"shows": {}, "diverges": None, "onset": 301, "injection": card(family="benign")}


def simulated(folder: Path, faults: dict) -> Path:
    simulate_experiment(folder, COUNTS, SIGNALS, DETECTORS, faults, baseline="late", steps=1000)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """Runs of the faults of the made-up board and, after them, of two benign controls, one of which even diverges."""
    return simulated(tmp_path_factory.mktemp("both") / "runs", FAULTS | {"loud": ALARMING, "quiet": SILENT})


def test_no_board_knows_that_there_are_benign_runs(both, tmp_path):
    alone = simulated(tmp_path / "runs", FAULTS)
    with_benign, without = load(both, both), load(alone, alone)
    assert with_benign.faults == without.faults == list(FAULTS)
    assert with_benign.benign_controls == ["loud", "quiet"]
    for track in ("reference", "self"):
        contests = [contest(experiment, TRACKS[track]) for experiment in (with_benign, without)]
        scores, expected = (run_scores(held).drop(columns="experiment") for held in contests)
        pd.testing.assert_frame_equal(scores, expected)
        tables = [lead_table(held) for held in contests]
        pd.testing.assert_frame_equal(*tables)
    boards = [board(held, run_scores(held)).drop(columns="experiment") for held in contests]
    pd.testing.assert_frame_equal(*boards)


def test_who_alarms_in_benign_runs_is_told_by_control(both):
    table = benign_table(contest(load(both, both), "reference")).set_index(["control", "detector"])
    assert set(table.index) == {
        (control, name) for control in ("loud", "quiet") for name in ("early", "late", "either")
    }
    assert (table["runs"] == COUNTS["faulty"]).all()
    assert table.loc[("loud", "early"), "share"] > 0.9
    assert table.loc[("quiet", "early"), "share"] < 0.5
    assert (table["alarms"] == (table["share"] * table["runs"]).round()).all()
    assert (table["alarms"] + table["alarms_before"] <= table["runs"]).all()


def test_alarms_from_elsewhere_count_in_benign_runs_too(both, tmp_path):
    experiment, path = load(both, both), tmp_path / "mine.csv"
    runs = experiment.of(BENIGN, fault="loud")
    (faulty, *_) = experiment.of("faulty")  # without a run that is scored a monitor does not enter
    rows = [(run.trace.run_id, "mine", run.onset) for run in (*runs, faulty)]
    alarms = pd.DataFrame(rows, columns=["run_id", "monitor", "step"])
    alarms.iloc[0, 2] = 5  # before its onset
    alarms.to_csv(path, index=False)
    (external,) = read_alarms([path], [experiment])
    table = benign_table(contest(experiment, "reference", external=external)).set_index(["control", "detector"])
    assert table.loc[("loud", "mine"), ["alarms", "alarms_before"]].tolist() == [len(runs) - 1, 1]
    assert table.loc[("quiet", "mine"), ["alarms", "alarms_before"]].tolist() == [0, 0]
    assert not {"never", "oracle"} & {name for _, name in table.index}


def test_an_experiment_of_benign_controls_alone_is_refused(tmp_path):
    folder = simulated(tmp_path / "runs", {"loud": ALARMING})
    with pytest.raises(ValueError, match="all of them are benign controls; scoring needs at least one fault"):
        load(folder, folder)


def test_a_report_tells_outcomes_and_sirens(both, tmp_path):
    report = tmp_path / "report"
    report.mkdir()
    shutil.copy(both / "experiment.json", report)
    make_report(report, both)
    outcomes = pd.read_csv(report / "outcomes.csv", keep_default_na=False)
    of_fault = outcomes.groupby("fault")["outcome"]
    assert set(of_fault.get_group("attention")) == {"divergence"} == set(of_fault.get_group("loud"))
    assert "divergence" not in set(of_fault.get_group("healthy"))
    assert set(outcomes["role"]) == {"faulty", BENIGN, "test"}
    assert set(pd.read_csv(report / "benign.csv")["control"]) == {"loud", "quiet"}
    page = (report / "index.html").read_text(encoding="utf-8")
    assert "Outcomes of faulty runs on the clean label" in page and "24 benign runs" in page


def with_clean(folder: Path, shift: float) -> None:
    """Give a run a clean label that stands apart from its own over the second half."""
    run = trace.read(folder)
    own = run.signals[LABEL_SIGNAL]
    values = own.values.ravel() + np.where(own.steps > 500, shift, 0.0)
    size = len(values)
    rows = {
        "step": own.steps,
        "tokens": own.tokens,
        "signal": np.full(size, CLEAN_SIGNAL, object),
        "layer": np.full(size, -1),
        "head": np.full(size, -1),
        "value": values,
        "undefined": np.zeros(size, bool),
    }
    trace.write_part(folder, 2000, 3000, rows)  # a made-up manifest lists no files
    manifest = trace.manifest_of(folder)
    manifest["signals"][CLEAN_SIGNAL] = manifest["signals"][LABEL_SIGNAL]
    trace.write_manifest(folder, manifest)


def test_divergence_and_outcome_are_judged_on_the_clean_label(tmp_path):
    folder = simulated(tmp_path / "runs", {"batch8": FAULTS["batch8"], "attention": FAULTS["attention"]})
    before = {run.trace.run_id: run for run in load(folder, folder).runs}
    with_clean(folder / "batch83000", 1.0)
    after = {run.trace.run_id: run for run in load(folder, folder).runs}
    same = {name for name, run in after.items() if run.outcome == before[name].outcome}
    assert after.keys() - same == {"batch83000"}
    assert all(after[name].divergence == before[name].divergence for name in same)
    assert before["batch83000"].divergence is None and 510 <= after["batch83000"].divergence <= 530
    table = outcome_table(load(folder, folder)).set_index("run_id")
    assert table.loc["batch83000", "outcome"] == "divergence"
    twins = [folder / f"calibration{1000 + i}" for i in range(COUNTS["calibration"])]
    assert outcome_of_folders(folder / "batch83000", twins).outcome == "divergence"
    assert outcome_of_folders(folder / "batch83001", twins).outcome == table.loc["batch83001", "outcome"]


def test_a_folder_without_a_run_is_named(both):
    with pytest.raises(trace.TraceError, match="absent"):
        outcome_of_folders(both / "batch83000", [both / "absent"])


def test_both_sides_call_the_signals_the_same():
    assert (HELD_OUT.name, CLEAN.name) == (LABEL_SIGNAL, CLEAN_SIGNAL)
