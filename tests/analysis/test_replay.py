"""The leaderboard on made-up runs with a known answer: what is ranked, what is flagged or refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foreshock.analysis.detect.controls import random_timer
from foreshock.analysis.runs.load import load
from foreshock.analysis.score import main
from foreshock.analysis.scores.contest import contest, run_scores
from foreshock.analysis.scores.sensitivity import halves, label_sensitivity
from foreshock.experiments import trace
from tests.analysis.made_up_board import COUNTS, DETECTORS, FAULTS, LATE, SIGNALS, scored
from tests.described import described

ROOT = Path(__file__).parents[2]


def test_the_board_says_what_was_put_in(folder, tmp_path):
    table = scored(folder, tmp_path / "out", tracks=("reference", "self"))
    for track in ("reference", "self"):
        early, late = (table.loc[(track, "attention", name)] for name in ("early", "late"))
        assert early["iqm_lead_steps"] == pytest.approx(400, abs=25)
        assert late["iqm_lead_steps"] == pytest.approx(100, abs=25)  # one run in ten may alarm by chance before
        assert early["detected"] == 1 and early["diverged"] == 12
        assert early["rmlt_low"] <= early["rmlt_steps"] <= early["rmlt_high"]
        assert 150 < early["relative_lead_steps"] < 350
        assert late["relative_lead_steps"] == 0
        assert early["smallest_p"] == 2**-12 <= early["p_beats_baseline"] < 0.002
        assert (early["rank_low"], early["rank_high"]) <= (2, 2)
    both = table.loc[("reference", "all")]
    assert both.loc["early", "runs"] == 36 and both.loc["early", "diverged"] == 24
    assert both.loc["either", "rmlt_steps"] > both.loc["early", "rmlt_steps"]
    assert both.loc["early", "alpha_supported"] == pytest.approx(0.1)
    assert np.isnan(table.loc[("reference", "batch8", "early"), "rmlt_steps"])
    assert not both.loc["early", "exploratory"]
    assert both.loc["early", "healthy_runs"] == 6


@pytest.mark.slow
def test_controls_earn_what_they_know(folder, tmp_path):
    board = scored(folder, tmp_path / "out", tracks=("reference",))
    table = board.loc[("reference", "all")]
    assert table.loc["never", "rmlt_steps"] == table.loc["step counter", "rmlt_steps"] == 0
    assert table.loc["onset oracle", "rmlt_steps"] == pytest.approx(((800 - 301) + (700 - 301)) / 2)
    assert table.loc["onset oracle", "share_of_possible_lead"] == 1
    ramp = board.loc[("reference", "ramp"), "delay_steps"]
    assert ramp["onset oracle"] == 0 and ramp["never"] == 1000 - 301
    assert table.loc["never", "detected"] == 0 and table.loc["onset oracle", "detected"] == 1
    assert table.loc[["never", "onset oracle"], "rank"].isna().all()


def test_the_random_timer_keeps_its_rate(folder):
    experiment = load(folder, folder)
    run = experiment.runs[0]
    alarms = []
    for i in range(2000):
        object.__setattr__(run.trace, "run_id", f"run{i}")
        alarms.append(random_timer(run, experiment, 0.10))
    rate = np.mean([alarm is not None for alarm in alarms])
    assert abs(rate - 0.10) < 4 * np.sqrt(0.1 * 0.9 / 2000)
    early = np.mean([alarm <= 500 for alarm in alarms if alarm is not None])
    assert abs(early - 0.513) < 4 * np.sqrt(0.25 / 200)


def test_no_detector_is_scored_on_its_own_past_where_the_fault_is_in_it(made, tmp_path):
    early_onset = {"attention": FAULTS["attention"] | {"onset": 1}}
    folder = made(COUNTS, SIGNALS, DETECTORS, early_onset | {"ramp": FAULTS["ramp"]}, baseline="late", name="early")
    table = scored(folder, tmp_path / "out", tracks=("self",))
    assert "attention" not in table.loc["self"].index.get_level_values("fault")
    assert table.loc[("self", "ramp", "early"), "runs"] == 12


def test_the_published_track_uses_the_sources_number_alone(folder, tmp_path):
    table = scored(folder, tmp_path / "out", tracks=("published",), singles=True)
    row = table.loc[("published", "all", "update_to_weight")]
    assert row["healthy_alarms"] == 6  # signals of 2.0 are above 1e-2: the number does not fit, and the table says so
    assert np.isnan(row["alpha"])
    assert "no published threshold" in table.loc[("published", "all", "early"), "declined"]


def test_signals_that_no_run_has_are_declined_by_name(folder, tmp_path):
    experiment = load(folder, folder)
    assert "elsewhere" not in contest(experiment, "reference").detectors  # the model does not have it
    mine = tmp_path / "mine.py"
    mine.write_text("signals = ['router_entropi']\ndef statistic(x):\n    return x\n")
    table = scored(folder, tmp_path / "out", tracks=("reference",), detectors=(mine,))
    assert "router_entropi" in table.loc[("reference", "all", "mine"), "declined"]


@pytest.mark.slow
def test_bare_run_folders_find_their_roles_by_seed(folder, tmp_path):
    indexed = scored(folder, tmp_path / "a", tracks=("reference",))
    (folder / "experiment.json").unlink()
    for path in folder.glob("batch8*"):
        shutil.rmtree(path)
    for path in folder.glob("ramp*"):
        shutil.rmtree(path)
    bare = scored(folder, tmp_path / "b", tracks=("reference",))
    one, other = (t.loc["reference"] for t in (indexed, bare))
    assert set(other.index.get_level_values("fault")) == {"all", "Simulated"}
    assert other.loc[("Simulated", "gradient norm"), "rmlt_steps"] == one.loc[("attention", "late"), "rmlt_steps"]


def test_halves_of_the_calibration_runs_agree_on_a_clear_ranking(folder):
    table, tau = halves(contest(load(folder, folder), "reference"))
    assert set(table["detector"]) >= {"early", "late", "either"}
    assert tau > 0.5
    assert (table.set_index("detector").loc["late", ["rmlt_half_a", "rmlt_half_b"]] > 50).all()


def test_another_label_moves_the_lead(folder):
    one = contest(load(folder, folder), "reference")
    later = {run.trace.run_id: None if run.divergence is None else run.divergence + 100 for run in one.experiment.runs}
    before, after = (run_scores(one, labels) for labels in (None, later))
    change = (after["lead"] - before["lead"])[(before["detector"] == "early") & (before["outcome"] == "lead")]
    assert len(change) and (change == 100).all()
    table = label_sensitivity(one)
    assert set(table["label"]) == {"primary", "delta x0.5", "delta x2", "training loss", "OLMo", "LLM-Foundry"}


def change_manifest(folder: Path, name: str, **changes) -> None:
    trace.write_manifest(folder / name, trace.read_manifest(folder / name) | changes)


def config_of(folder: Path, name: str) -> dict:
    return trace.read_manifest(folder / name)["config"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: change_manifest(f, "calibration1000", source_sha256="t" * 64), "differ in source_sha256"),
        (
            lambda f: change_manifest(f, "calibration1000", config={"train": {"steps": 900}}),
            "healthy runs of one calibration differ in",
        ),
        (
            lambda f: change_manifest(f, "ramp3000", config=config_of(f, "ramp3000") | {"data": 1}),
            "a faulty run and its healthy ones differ in data",
        ),
        (lambda f: change_manifest(f, "calibration1000", seed=3), "has seed 3, the index says 1000"),
        (lambda f: change_manifest(f, "ramp3000", onset_step=None), "ramp3000 is healthy, the index says ramp"),
        (lambda f: change_manifest(f, "test2000", end_reason="running"), "unfinished"),
        (lambda f: shutil.rmtree(f / "test2000"), "test2000"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(trace.TraceError, match=message):
        scored(folder, tmp_path / "out")


def test_too_few_calibration_runs_name_the_alpha_that_they_support(folder, tmp_path):
    with pytest.raises(ValueError, match=r"9 calibration runs cannot support alpha=0.01: the smallest is 0.1"):
        scored(folder, tmp_path / "out", alpha=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=nowhere", "out=x"], "runs='nowhere' is not allowed: there is no such folder"),
        (["runs=.", "out=x", "detctor=a.py"], "detctor is not an option"),
        (["runs=.", "out=x", "alpha=often"], "alpha=often is not allowed"),
        (
            ["runs=.", "out=x", "tracks=floot"],
            "tracks='floot' is not allowed: one of reference, self, floor, published",
        ),
        (["runs=.", "out=x", "tracks=reference,reference"], "tracks=reference,reference is not allowed"),
        (["runs=.", "out=x", "alpha=1.5"], "alpha=1.5 is not allowed: between 0 and 1"),
        (["runs=.", "out=x", "rule=emwa"], "rule='emwa' is not allowed: one of adwin, cusum, ewma"),
        (["runs=.", "out=x", "runs=y"], "runs is given 2 times"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is damaged (is no JSON object): the command that made it writes it again"),
        ("null", "is damaged (is no JSON object)"),
        ("{", "is damaged (Expecting property name"),
        ("{}", "experiment=null is not allowed: keys with values"),
    ],
)
def test_an_index_that_is_none_is_named(folder, tmp_path, content, message):
    (folder / "experiment.json").write_text(content)
    with pytest.raises(trace.TraceError, match=re.escape(message)) as error:
        scored(folder, tmp_path / "out")
    assert str(folder / "experiment.json") in str(error.value) and "\n" not in str(error.value)


def test_an_index_names_the_key_that_is_not_allowed(folder, tmp_path):
    index = json.loads((folder / "experiment.json").read_text())
    index["runs"][0]["seed"] = 10**29
    (folder / "experiment.json").write_text(json.dumps(index))
    with pytest.raises(trace.TraceError, match=r"runs\.0\.seed=10+ is not allowed"):
        scored(folder, tmp_path / "out")


def test_the_command_is_that_of_the_readme():
    done = subprocess.run([sys.executable, "-m", "analysis.score", "out=x"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "runs=DIR is missing" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_largest_calibration_run_is_a_threshold_of_its_own_name(folder, tmp_path):
    usual, maximum = (
        scored(folder, tmp_path / "out", tracks=("reference",), alpha=0.2, maximum=chosen).loc[("reference", "all")]
        for chosen in (False, True)
    )
    assert (maximum.loc[["early", "late"], "threshold"] > usual.loc[["early", "late"], "threshold"]).all()
    assert maximum.loc["early", "alpha"] == pytest.approx(0.1)
    assert maximum.loc["early", "false_alarm_bound"] == pytest.approx(1 - 0.05 ** (1 / 9))


def test_a_run_listed_twice_is_refused(folder, tmp_path):
    index = json.loads((folder / "experiment.json").read_text())
    index["runs"][-1]["run_id"] = index["runs"][-2]["run_id"]
    (folder / "experiment.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is listed twice"):
        scored(folder, tmp_path / "out")


@pytest.mark.parametrize("lost", [slice(50, None), slice(20, 22), slice(0, None)])
def test_a_run_that_lost_samples_is_flagged_and_not_read_as_silent(folder, tmp_path, lost):
    part = next((folder / "attention3004" / "trace").glob("*.parquet"))
    table = pd.read_parquet(part)
    mine = table.index[table["signal"] == LATE]
    table = table.drop(mine[lost])
    part.unlink()
    columns = {name: table[name].astype(str if name == "signal" else table[name].dtype).to_numpy() for name in table}
    trace.write_part(folder / "attention3004", 0, 1000, columns)
    with pytest.raises(ValueError, match="baseline 'late' cannot be judged: run attention3004 has no sample of grad"):
        scored(folder, tmp_path / "out", tracks=("reference",))


def test_two_experiments_of_one_name_are_refused(folder, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / "both" / name)
    with pytest.raises(trace.TraceError, match="holds experiment 'made' on mha_nano twice"):
        scored(tmp_path / "both", tmp_path / "out")


@pytest.mark.slow
def test_an_alarm_before_the_onset_earns_nothing_over_the_baseline(folder, tmp_path):
    experiment = load(folder, folder)
    rows = [(run.trace.run_id, "hasty", 200) for run in experiment.of("faulty", fault="ramp")]
    path = tmp_path / "hasty.csv"
    pd.DataFrame(rows, columns=["run_id", "monitor", "step"]).to_csv(path, index=False)
    table = scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",))
    assert table.loc[("reference", "ramp", "hasty"), "relative_lead_steps"] < 0
    assert table.loc[("reference", "ramp", "hasty"), "false_alarm"] == 12


def test_a_track_on_which_nobody_has_a_say_lists_who_declined(folder, tmp_path):
    table = scored(folder, tmp_path / "out", tracks=("floor",))
    assert set(table.loc["floor"]["kind"]) == {"detector", "baseline", "control"}


def test_a_run_that_ended_before_its_first_sample_is_scored_with_the_others(folder, tmp_path):
    part = next((folder / "ramp3000" / "trace").iterdir())
    rows = pd.read_parquet(part)
    rows[rows["step"] <= 15].to_parquet(part)  # the label has one sample by then, what the baseline reads below none
    change_manifest(folder, "ramp3000", steps_done=15, end_reason="diverged")
    index = json.loads((folder / "experiment.json").read_text())
    index["experiment"] |= {"score_every": 20}
    (folder / "experiment.json").write_text(json.dumps(index))
    table = scored(folder, tmp_path / "out", tracks=("reference",)).loc["reference"]
    assert table.loc[("ramp", "late"), "runs"] == table.loc[("ramp", "river kswin"), "runs"] == 12


def bare(folder, **kept):
    """A folder's runs without an index, so many of each role (all where none is given)."""
    (folder / "experiment.json").unlink()
    for role, count in kept.items():
        for run in sorted(folder.glob(f"{role}*"))[count:]:
            shutil.rmtree(run)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"calibration": 0}, r"no calibration run of dense d_model=8, healthy, with a seed from 1000 to 1999: .* 19"),
        ({"reference": 0}, r"no reference run .* seed from 0 to 999: .* are 0 reference, 9 calibration, 6 test"),
        ({"attention": 0, "ramp": 0, "batch8": 0}, r"no faulty run of dense d_model=8, with a fault: at least 1"),
    ],
)  # fmt: skip
def test_bare_runs_that_lack_a_role_are_an_error_that_says_what_its_runs_are(folder, tmp_path, kept, message):
    bare(folder, **kept)
    with pytest.raises(trace.TraceError, match=message):
        scored(folder, tmp_path / "out")


def test_one_calibration_run_supports_half_and_the_board_says_so(made, tmp_path, capsys):
    signals = {name: described(name) for name in ("train_loss_ema", "grad_global_norm")}
    faults = {"attention": {"shows": {"grad_global_norm": 400}, "diverges": 700, "onset": 301}}
    counts = {"reference": 4, "calibration": 1, "test": 2, "faulty": 3}
    bare(folder := made(counts, signals, {"loss": ["train_loss_ema"]}, faults, baseline="loss"))
    main([f"runs={folder}", f"out={tmp_path / 'out'}", "tracks=reference"])
    said = " ".join(capsys.readouterr().out.split())
    assert "At 50% false alarms per run. Calibration runs: 1, which support 50.0% and more; 5% needs 19." in said
    assert not (tmp_path / "out" / "halves.csv").exists()  # which needs a run for each half
    with pytest.raises(SystemExit):
        main([f"runs={folder}", f"out={tmp_path / 'out'}", "tracks=reference", "alpha=0.1"])
    assert (
        "1 calibration runs cannot support alpha=0.1: the smallest is 0.5, and 0.1 needs 9" in capsys.readouterr().err
    )
