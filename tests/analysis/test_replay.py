"""The leaderboard on made-up runs with a known answer: what enters, what is ranked, what is flagged or refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import reduced
from analysis.contest import contest, run_scores
from analysis.controls import random_timer
from analysis.detection import Detection
from analysis.experiment import load
from analysis.replay import Request, main, replay
from analysis.sensitivity import halves, label_sensitivity, other_labels
from experiments import trace

ROOT = Path(__file__).parents[2]
SIGNALS = {
    "qk_delta2_spectrum.entropy.w50": {"unit": "nats", "bad": "down", "axes": ["layer", "head"], "every_steps": 10},
    "grad_global_norm": {"unit": "1", "bad": "up", "axes": [], "every_steps": 5},
    "update_to_weight": {"unit": "1", "bad": "both", "axes": ["layer"], "every_steps": 10},
}
EARLY, LATE = "qk_delta2_spectrum.entropy.w50", "grad_global_norm"
DETECTORS = {"early": [EARLY], "late": [LATE], "either": [EARLY, LATE], "elsewhere": ["absent"]}
COUNTS = {"reference": 5, "calibration": 9, "test": 6, "faulty": 12}
FAULTS = {
    "attention": {"shows": {EARLY: 400, LATE: 700}, "diverges": 800, "onset": 301},
    "ramp": {"shows": {LATE: 600}, "diverges": 700, "onset": 301},
    "batch8": {"shows": {}, "diverges": None, "onset": 301},
}


@pytest.fixture
def folder(made) -> Path:
    return made(COUNTS, SIGNALS, DETECTORS, FAULTS, baseline="late")


def scored(folder: Path, out: Path, **options) -> pd.DataFrame:
    table = replay(Request(runs=folder, out=out, **options)).get("leaderboard")
    return table.set_index(["track", "fault", "detector"]).sort_index()


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


def test_controls_earn_what_they_know(folder, tmp_path):
    board = scored(folder, tmp_path / "out", tracks=("reference",))
    table = board.loc[("reference", "all")]
    assert table.loc["never", "rmlt_steps"] == table.loc["step counter", "rmlt_steps"] == 0
    assert table.loc["onset oracle", "rmlt_steps"] == pytest.approx(((800 - 301) + (700 - 301)) / 2)
    assert table.loc["onset oracle", "normalised_lead"] == 1
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


ENTRANTS = {
    "same": "def statistic(x):\n    e, out = 0.0, []\n    for z in x:\n        e = 0.8 * e + 0.2 * z\n"
    "        out.append(e)\n    import numpy as np\n    return np.array(out)\n",
    "seer": "def statistic(x):\n    return x - x.mean()\n",
    "reverser": "def statistic(x):\n    return x[::-1]\n",
    "fails": "def statistic(x):\n    return x / 'a'\n",
    "short": "def statistic(x):\n    return x[1:]\n",
    "fitted": "import numpy as np\nclass Rule:\n    def __init__(self, level):\n        self.level = level\n"
    "    def statistic(self, x):\n        return x - self.level\n"
    "def calibrate(healthy):\n    return Rule(np.concatenate(healthy).mean())\ndef statistic(x):\n    return x\n",
    # speaks from its first sample where the series ends badly
    "peeper": "import numpy as np\ndef statistic(x):\n    return np.where(np.nanmax(x) > 20, 9.0, 0.1) + 0 * x\n",
    # keeps silent about an excursion that will pass
    "husher": "import numpy as np\ndef statistic(x):\n    return np.where(x[-1] < 3, np.minimum(x, 1.0), x)\n",
    "warming": "import pandas as pd\ndef statistic(x):\n    return pd.Series(x).rolling(5).mean().to_numpy()\n",
    "lost": "import numpy as np\ndef statistic(x):\n    return np.where(np.arange(len(x)) == 30, np.nan, x)\n",
    "quitter": "import sys\ndef statistic(x):\n    sys.exit(0)\n",
    "silent": "import numpy as np\ndef statistic(x):\n    return np.full(len(x), np.nan)\n",
}


def test_anyones_detector_enters_and_a_bad_one_is_flagged(folder, tmp_path):
    paths = []
    for name, code in ENTRANTS.items():
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(f"signals = [{EARLY!r}]\n{code}")
    table = scored(folder, tmp_path / "out", tracks=("reference",), detectors=tuple(paths)).loc[("reference", "all")]
    for column in ("rmlt_steps", "detected", "healthy_alarms", "threshold"):
        assert table.loc["same", column] == pytest.approx(table.loc["early", column])
    assert table.loc["fitted", "rmlt_steps"] > 100
    declined = table["declined"]
    assert "looks ahead" in declined["seer"] and "looks ahead" in declined["reverser"]
    assert "TypeError" in declined["fails"] and "shape" in declined["short"]
    assert "too few samples" in declined["silent"]
    assert table.loc["warming", "rmlt_steps"] > 100  # it may need a while before it says something
    assert "not finite in calibration run" in declined["lost"]
    assert "looks ahead" in declined["peeper"] and "looks ahead" in declined["husher"]
    assert "SystemExit" in declined["quitter"]


def test_anyones_alarms_enter_as_a_table(folder, tmp_path):
    experiment = load(folder, folder)
    rows = [(run.trace.run_id, "mine", 500) for run in experiment.of("faulty", fault="attention")]
    path = tmp_path / "mine.csv"
    pd.DataFrame(rows, columns=["run_id", "monitor", "step"]).to_csv(path, index=False)
    table = scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",)).loc["reference"]
    assert table.loc[("attention", "mine"), "rmlt_steps"] == 300
    assert table.loc[("ramp", "mine"), "rmlt_steps"] == 0
    assert table.loc[("all", "mine"), "healthy_alarms"] == 0 and table.loc[("all", "mine"), "rank"] > 0


def test_who_alarms_in_healthy_runs_more_often_than_allowed_is_shown_and_not_ranked(folder, tmp_path):
    experiment = load(folder, folder)
    rows = [(run.trace.run_id, "trigger-happy", 1) for run in experiment.of("faulty", "test")]
    path = tmp_path / "mine.csv"
    pd.DataFrame(rows, columns=["run_id", "monitor", "step"]).to_csv(path, index=False)
    table = scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",)).loc[("reference", "all")]
    row = table.loc["trigger-happy"]
    assert row["healthy_alarms"] == 6 and row["false_alarm_low"] > 0.1 and np.isnan(row["rank"])
    assert table.loc["early", "rank"] > 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("run_id,monitor\nattention3000,mine\n", "no column 'step'"),
        ("run_id,monitor,step\nattention9,mine,5\n", "line 2: run_id='attention9' is not one of"),
        ("run_id,monitor,step\nattention3000,mine,5\nattention3000,mine,7\n", "line 3: .* two alarms"),
        ("run_id,monitor,step\nattention3000,mine,1001\n", "line 2: step=1001 is beyond the horizon of 1000"),
        ("run_id,monitor,step\nattention3000,mine,inf\n", "line 2: step=inf"),
        ("run_id,monitor,step\nattention3000,,5\n", "line 2: monitor is empty"),
        ("run_id,monitor,step\nattention3000,mine,soon\n", "line 2: step='soon'"),
        ("run_id,monitor,step\nattention3000,mine,-5\n", "line 2: step=-5"),
        ("run_id,monitor,step\nattention3000,mine,2.5\n", "line 2: step=2.5"),
        ("run_id,monitor,step\nattention3000,early,5\n", "'early' is on the board already"),
    ],
)
def test_a_bad_table_of_alarms_is_refused_by_line(folder, tmp_path, lines, message):
    path = tmp_path / "mine.csv"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        scored(folder, tmp_path / "out", alarms=(path,), tracks=("reference",))


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


def test_a_reduced_folder_scores_as_its_runs_do(folder, tmp_path):
    experiment = load(folder, folder)
    small = tmp_path / "small"
    reduced.write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), small)
    size = sum(path.stat().st_size for path in small.iterdir())
    assert size < 0.2 * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    whole, again = (scored(one, tmp_path / "out", tracks=("reference",)) for one in (folder, small))
    own = whole["kind"] != "entrant"  # a count of drifts may jump with the last bit
    pd.testing.assert_frame_equal(whole[own], again[own], rtol=0.02)
    a, b = (label_sensitivity(contest(load(one, one), "reference")) for one in (folder, small))
    pd.testing.assert_frame_equal(a, b, rtol=0.02)


def test_rounding_is_to_the_nearest_multiple_and_keeps_what_is_not_finite():
    values = np.array([1.0, 1.1, 1.13, -3.14159, np.inf, -np.inf, np.nan, 0.3])
    quantum = np.array([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.0])
    found = reduced.rounded(values, quantum)
    assert found.dtype == np.float32
    assert found[:4].tolist() == [1.0, 1.0, 1.25, -3.25]  # 0.3 is lowered to a quarter
    assert np.array_equal(found[4:7], values[4:7].astype(np.float32), equal_nan=True) and found[7] == np.float32(0.3)


def test_rounding_moves_z_scores_by_a_small_part_of_a_standard_deviation(folder, tmp_path):
    """By 1/64 for the value, and as much again for the band, whose centre and scale are of rounded values."""
    experiment, small = load(folder, folder), tmp_path / "small"
    reduced.write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), small)
    again = load(small, small)
    for signal in (EARLY, LATE):  # what the detectors read
        before, after = (Detection(one).sides(signal) for one in (experiment, again))
        z, moved = (np.concatenate([one[run].series[0] for run in before]) for one in (before, after))
        assert np.max(np.abs(moved - z) / (1 + np.abs(z))) < 4 / 64


def test_manifests_are_put_together_again():
    records = [{"a": 1, "b": {"c": 2, "d": i}, "e": i, "f": {"g": 1}} for i in range(3)]
    shared = reduced.common(records)
    assert shared == {"a": 1, "b": {"c": 2}, "f": {"g": 1}}
    assert [reduced.merged(shared, reduced.without(record, shared)) for record in records] == records


def test_a_reduced_folder_of_another_schema_is_refused(folder, tmp_path, monkeypatch):
    experiment = load(folder, folder)
    monkeypatch.setattr(trace, "SCHEMA_VERSION", 1)
    reduced.write(experiment.index, [run.trace for run in experiment.runs], other_labels(experiment), tmp_path / "old")
    monkeypatch.undo()
    with pytest.raises(trace.TraceError, match="schema version 1, this code reads 2"):
        reduced.read(tmp_path / "old")


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
        (["runs=nowhere", "out=x"], "nowhere holds neither experiment.json nor a finished run"),
        (["runs=x", "out=x", "detctor=a.py"], "detctor is not an option"),
        (["runs=x", "out=x", "alpha=often"], "alpha=often is not allowed"),
        (["runs=x", "out=x", "tracks=floot"], "tracks=floot is not allowed: of reference, self, floor, published"),
        (["runs=x", "out=x", "rule=emwa"], "rule=emwa is not allowed: one of adwin, cusum, ewma"),
        (["runs=x", "out=x", "runs=y"], "runs is given 2 times"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert message in said and said.count("\n") == 1


def test_the_command_is_that_of_the_readme():
    done = subprocess.run([sys.executable, "-m", "analysis.score", "out=x"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "runs=DIR is missing" in done.stderr and done.stderr.count("\n") == 1


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
    assert set(table.loc["floor"]["kind"]) == {"detector", "control"}
