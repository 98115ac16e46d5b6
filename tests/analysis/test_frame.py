"""Readings of saved runs as one table: every kind of folder, and names that are not there."""

import shutil

import numpy as np
import pandas as pd
import pytest

import foreshock
from foreshock.analysis.load import main
from foreshock.analysis.runs.frame import COLUMNS
from foreshock.analysis.runs.simulated import simulate_run
from foreshock.experiments import trace
from foreshock.experiments.build import ROOT
from foreshock.experiments.import_runs import main as import_runs
from foreshock.experiments.trace import TraceError
from tests.described import described

REDUCED = ROOT / "tests" / "golden" / "reference_set"
SIGNALS = {"attn_entropy": described("attn_entropy"), "grad_global_norm": described("grad_global_norm")}


@pytest.fixture
def folder(tmp_path):
    simulate_run(tmp_path / "runs" / "healthy", 3, SIGNALS, steps=100)
    simulate_run(tmp_path / "runs" / "faulty", 3001, SIGNALS, steps=100, onset=20, shows={"grad_global_norm": 50})
    return tmp_path / "runs"


def test_run_folders_give_one_tidy_table(folder):
    table = foreshock.load(folder)
    assert tuple(table.columns) == COLUMNS
    saved = trace.read(folder / "healthy").signals["attn_entropy"]
    own = table[(table["run_id"] == "healthy") & (table["signal"] == "attn_entropy")]
    cell = own[(own["layer"] == 1) & (own["head"] == 0)]
    assert cell["step"].tolist() == saved.steps.tolist() and cell["tokens"].tolist() == saved.tokens.tolist()
    np.testing.assert_array_equal(cell["value"], saved.values[:, 1, 0])
    assert (table.loc[table["signal"] == "grad_global_norm", ["layer", "head"]] == -1).all(axis=None)
    facts = table.drop_duplicates("run_id").set_index("run_id")[["fault", "seed", "role"]]
    assert facts.loc["healthy"].tolist() == ["healthy", 3, "reference"]
    assert facts.loc["faulty"].tolist() == ["Simulated", 3001, "faulty"]


def test_text_is_kept_as_categories_and_axes_as_small_integers(folder):
    table = foreshock.load(folder)
    assert all(isinstance(table[name].dtype, pd.CategoricalDtype) for name in ("run_id", "signal", "fault", "role"))
    kinds = {"step": "int64", "tokens": "int64", "layer": "int16", "head": "int16", "value": "float64", "seed": "int64"}
    assert {name: str(table[name].dtype) for name in kinds} == kinds
    assert table.memory_usage(deep=True).sum() < 50 * len(table) + 10_000


def test_a_missing_sample_is_told_from_a_reading_that_is_not_a_number(folder, tmp_path):
    columns = {
        "step": [1, 2], "tokens": [1, 2], "signal": ["grad_global_norm"] * 2, "layer": [-1, -1], "head": [-1, -1],
        "value": [0.0, np.nan], "undefined": [True, False],
    }  # fmt: skip
    own = tmp_path / "own" / "one"
    own.mkdir(parents=True)
    trace.write_part(own, 1, 2, columns)
    trace.write_manifest(own, trace.manifest_of(folder / "healthy"))
    table = foreshock.load(own.parent)
    assert table["value"].isna().all() and table["undefined"].tolist() == [True, False]


def test_signals_and_runs_that_are_asked_for(folder):
    table = foreshock.load(folder, signals=["grad_global_norm"], runs=["faulty"])
    assert set(table["signal"]) == {"grad_global_norm"} and set(table["run_id"]) == {"faulty"}


def test_a_reduced_set_with_the_roles_and_faults_of_its_index():
    table = foreshock.load(REDUCED, signals=["grad_global_norm", "held_out_loss"])
    assert set(table["role"]) == {"reference", "calibration", "test", "faulty"}
    assert set(table.loc[table["role"] == "faulty", "fault"]) == {"attention", "ramp", "batch8", "aux_off", "both"}
    assert set(table["signal"]) == {"grad_global_norm", "held_out_loss"}


def test_runs_from_elsewhere(tmp_path):
    (tmp_path / "mine.csv").write_text("step,loss,seed\n0,3,5\n10,2,5\n")
    import_runs(["csv", str(tmp_path / "mine.csv"), f"out={tmp_path / 'runs'}"])
    table = foreshock.load(tmp_path / "runs")
    assert table[["run_id", "step", "signal", "value", "fault", "seed", "role"]].to_numpy().tolist() == [
        ["mine", 0, "train_loss_raw", 3.0, "healthy", 5, "elsewhere"],
        ["mine", 10, "train_loss_raw", 2.0, "healthy", 5, "elsewhere"],
    ]


def test_one_csv_a_run_reads_back_as_the_table(folder, tmp_path, capsys):
    main([f"runs={folder}", f"csv={tmp_path / 'tables'}", "signals=grad_global_norm"])
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"healthy.csv", "faulty.csv"}
    read = pd.read_csv(tmp_path / "tables" / "faulty.csv")
    whole = foreshock.load(folder, ["grad_global_norm"], ["faulty"])
    assert tuple(read.columns) == COLUMNS
    np.testing.assert_array_equal(read["value"], whole["value"])
    assert "2 runs" in capsys.readouterr().out


def test_runs_without_a_file_are_named_with_the_reason(folder, tmp_path, capsys):
    manifest = trace.manifest_of(folder / "faulty")
    trace.write_manifest(folder / "faulty", {**manifest, "end_reason": "running"})
    simulate_run(folder / "other", 5, {"attn_entropy": SIGNALS["attn_entropy"]}, steps=100)
    main([f"runs={folder}", f"csv={tmp_path / 'tables'}", "signals=grad_global_norm"])
    printed = capsys.readouterr()
    assert printed.err == (
        "left out: other: it has no readings of grad_global_norm; faulty: it is running, and not finished\n"
    )
    assert printed.out.endswith(": 1 runs\n")
    shutil.rmtree(folder / "other" / "trace")
    main([f"runs={folder}", f"csv={tmp_path / 'without'}"])
    assert capsys.readouterr().err == "left out: faulty: it is running, and not finished; other: its trace is missing\n"
    main([f"runs={folder}", f"csv={tmp_path / 'more'}", "only=healthy"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"signals": ["grad_global_nrm"]},
            "signals='grad_global_nrm': no run in .* has it; the nearest is 'grad_global",
        ),
        ({"signals": ["grad_global_norm", "mfu"]}, "signals='mfu': no run in .* has it"),
        ({"runs": ["helthy"]}, "runs='helthy': no finished run in .* is called so; the nearest are 'healthy'"),
        ({"runs": ["healthy", "healthy"]}, "healthy stands there twice"),
    ],
)
def test_names_that_are_not_there(folder, options, said):
    with pytest.raises(ValueError, match=said):
        foreshock.load(folder, **options)


def test_folders_without_a_finished_run(folder, tmp_path):
    with pytest.raises(TraceError, match="nowhere does not exist"):
        foreshock.load(tmp_path / "nowhere")
    manifest = trace.manifest_of(folder / "healthy")
    for run in ("healthy", "faulty"):
        trace.write_manifest(folder / run, {**manifest, "end_reason": "running"})
    with pytest.raises(TraceError, match="holds no finished run"):
        foreshock.load(folder)


def test_one_run_twice_is_refused(folder):
    simulate_run(folder / "again" / "healthy", 3, SIGNALS, steps=100)
    with pytest.raises(TraceError, match="holds run healthy twice"):
        foreshock.load(folder)
